//! Reads a case per line, its five parts in base64: secret, id, timestamp, signatures, body; answers each with
//! "accepted" or "refused: why".

use base64::{engine::general_purpose::STANDARD, Engine};
use http::{HeaderMap, HeaderValue};
use standardwebhooks::Webhook;
use std::error::Error;
use std::io::{stdin, stdout, Write};

fn main() -> Result<(), Box<dyn Error>> {
    for line in stdin().lines() {
        let parts = line?.split('\t').map(|part| STANDARD.decode(part)).collect::<Result<Vec<_>, _>>()?;
        match verify(&parts) {
            Ok(()) => println!("accepted"),
            Err(error) => println!("refused: {error}"),
        }
        stdout().flush()?;
    }
    Ok(())
}

fn verify(parts: &[Vec<u8>]) -> Result<(), Box<dyn Error>> {
    let mut headers = HeaderMap::new();
    for (name, value) in ["webhook-id", "webhook-timestamp", "webhook-signature"].into_iter().zip(&parts[1..4]) {
        headers.insert(name, HeaderValue::from_bytes(value)?);
    }
    Ok(Webhook::new(std::str::from_utf8(&parts[0])?)?.verify(&parts[4], &headers)?)
}

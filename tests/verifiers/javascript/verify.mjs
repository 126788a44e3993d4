// Reads a case per line, its five parts in base64: secret, id, timestamp, signatures, body; answers each with
// "accepted" or "refused: why".
import { createInterface } from "node:readline";
import { Webhook } from "standardwebhooks";

for await (const line of createInterface({ input: process.stdin })) {
  const [secret, id, timestamp, signatures, body] = line.split("\t").map((part) => Buffer.from(part, "base64"));
  const headers = {
    "webhook-id": id.toString(),
    "webhook-timestamp": timestamp.toString(),
    "webhook-signature": signatures.toString(),
  };
  let verdict = "accepted";
  try {
    new Webhook(secret.toString()).verify(body, headers, { jsonParse: false });
  } catch (error) {
    verdict = `refused: ${error}`.replaceAll("\n", " ");
  }
  process.stdout.write(verdict + "\n");
}

// Reads a case per line, its five parts in base64: secret, id, timestamp, signatures, body; answers each with
// "accepted" or "refused: why".
package main

import (
	"bufio"
	"encoding/base64"
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"strings"

	standardwebhooks "github.com/standard-webhooks/standard-webhooks/libraries/go"
)

func main() {
	lines := bufio.NewReader(os.Stdin)
	for {
		line, err := lines.ReadString('\n')
		if err == io.EOF {
			return
		}
		var parts [][]byte
		for _, part := range strings.Split(strings.TrimSuffix(line, "\n"), "\t") {
			decoded, err := base64.StdEncoding.DecodeString(part)
			if err != nil {
				log.Fatal(err)
			}
			parts = append(parts, decoded)
		}
		if err := verify(parts); err != nil {
			fmt.Printf("refused: %q\n", err)
		} else {
			fmt.Println("accepted")
		}
	}
}

func verify(parts [][]byte) error {
	webhook, err := standardwebhooks.NewWebhook(string(parts[0]))
	if err != nil {
		return err
	}
	headers := http.Header{}
	headers.Set("webhook-id", string(parts[1]))
	headers.Set("webhook-timestamp", string(parts[2]))
	headers.Set("webhook-signature", string(parts[3]))
	return webhook.Verify(parts[4], headers)
}

// Receives Relay's webhooks: each is verified, and each event is handled once.
//
// go get github.com/standard-webhooks/standard-webhooks/libraries; WEBHOOK_SECRET=whsec_… go run receive.go
package main

import (
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"sync"

	standardwebhooks "github.com/standard-webhooks/standard-webhooks/libraries/go"
)

type Event struct {
	Type string         `json:"type"`
	Data map[string]any `json:"data"`
}

// In your service: a table with a unique webhook_id, written in the transaction that does the work.
var (
	mutex   sync.Mutex
	handled = map[string]bool{}
)

// Your work; an error makes Relay try again later.
func handle(event Event) error {
	fmt.Println(event.Type, event.Data["outputs"])
	return nil
}

func handleOnce(id string, event Event) error {
	mutex.Lock()
	defer mutex.Unlock()
	if handled[id] {
		return nil
	}
	if err := handle(event); err != nil {
		return err
	}
	handled[id] = true
	return nil
}

func main() {
	webhook, err := standardwebhooks.NewWebhook(os.Getenv("WEBHOOK_SECRET"))
	if err != nil {
		log.Fatal(err)
	}
	receive := func(answer http.ResponseWriter, request *http.Request) {
		// The body as it came: parsed and written again it would not be what was signed.
		body, err := io.ReadAll(request.Body)
		if err != nil || webhook.Verify(body, request.Header) != nil {
			answer.WriteHeader(http.StatusBadRequest)
			return
		}
		var event Event
		if err := json.Unmarshal(body, &event); err != nil {
			answer.WriteHeader(http.StatusBadRequest)
			return
		}
		if err := handleOnce(request.Header.Get("webhook-id"), event); err != nil {
			log.Print(err)
			answer.WriteHeader(http.StatusInternalServerError)
			return
		}
		answer.WriteHeader(http.StatusNoContent)
	}
	port := os.Getenv("PORT")
	if port == "" {
		port = "3000"
	}
	log.Fatal(http.ListenAndServe("127.0.0.1:"+port, http.HandlerFunc(receive)))
}

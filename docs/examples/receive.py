"""Receives Relay's webhooks: each is verified, and each event is handled once.

pip install standardwebhooks; WEBHOOK_SECRET=whsec_… python3 receive.py
"""

import os
import sqlite3
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer

from standardwebhooks import Webhook, WebhookVerificationError

webhook = Webhook(os.environ["WEBHOOK_SECRET"])
database = sqlite3.connect("handled.db", isolation_level=None)
database.execute("CREATE TABLE IF NOT EXISTS handled (webhook_id TEXT PRIMARY KEY)")


def handle(event: dict) -> None:
    """Your work; what it raises makes Relay try again later."""
    print(event["type"], event["data"].get("outputs"), flush=True)


def handle_once(webhook_id: str, event: dict) -> None:
    # One transaction: what is remembered is done, and what is done is remembered.
    with database:
        database.execute("BEGIN IMMEDIATE")
        known = "INSERT INTO handled VALUES (?) ON CONFLICT DO NOTHING"
        if database.execute(known, (webhook_id,)).rowcount:
            handle(event)


class Receiver(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        # The body as it came: parsed and written again it would not be what was signed.
        body = self.rfile.read(int(self.headers["content-length"]))
        try:
            event = webhook.verify(body, dict(self.headers))
            handle_once(self.headers["webhook-id"], event)
            status = 204
        except WebhookVerificationError:
            status = 400
        except Exception as error:
            print(error, file=sys.stderr)
            status = 500
        self.send_response(status)
        self.end_headers()


HTTPServer(("127.0.0.1", int(os.environ.get("PORT", "3000"))), Receiver).serve_forever()

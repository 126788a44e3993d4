"""Reads a case per line, its five parts in base64: secret, id, timestamp, signatures, body; answers each with
"accepted" or "refused: why".
"""

import base64
import sys

from standardwebhooks import Webhook

for line in sys.stdin:
    secret, *values, body = (base64.b64decode(part) for part in line.rstrip("\n").split("\t"))
    names = ("webhook-id", "webhook-timestamp", "webhook-signature")
    headers = {name: value.decode() for name, value in zip(names, values, strict=True)}
    try:
        Webhook(secret.decode()).verify(body, headers, json_parse=False)
    except Exception as error:
        print(f"refused: {error!r}", flush=True)
    else:
        print("accepted", flush=True)

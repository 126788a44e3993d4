// Reads a case per line: {"secret", "headers", "body"}; answers a line for each: {"accepted", "error"}.
import { createInterface } from "node:readline";
import { Webhook } from "standardwebhooks";

for await (const line of createInterface({ input: process.stdin })) {
  const { secret, headers, body } = JSON.parse(line);
  let answer = { accepted: true };
  try {
    new Webhook(secret).verify(body, headers);
  } catch (error) {
    answer = { accepted: false, error: String(error) };
  }
  process.stdout.write(JSON.stringify(answer) + "\n");
}

// Receives Relay's webhooks: each is verified, and each event is handled once.
//
// npm install standardwebhooks; WEBHOOK_SECRET=whsec_… node receive.mjs
import { createServer } from "node:http";
import { Webhook } from "standardwebhooks";

const webhook = new Webhook(process.env.WEBHOOK_SECRET);
// In your service: a table with a unique webhook_id, written in the transaction that does the work.
const handled = new Map();

// Your work; what it throws makes Relay try again later.
async function handle(event) {
  console.log(event.type, event.data.outputs);
}

// What comes again during the work ends as the work does.
function handleOnce(id, event) {
  if (!handled.has(id)) {
    const work = handle(event);
    handled.set(id, work);
    work.catch(() => handled.delete(id));
  }
  return handled.get(id);
}

async function receive(request) {
  const chunks = [];
  for await (const chunk of request) chunks.push(chunk);
  let event;
  try {
    // The body as it came: parsed and written again it would not be what was signed.
    event = webhook.verify(Buffer.concat(chunks), request.headers);
  } catch {
    return 400;
  }
  try {
    await handleOnce(request.headers["webhook-id"], event);
    return 204;
  } catch (error) {
    console.error(error);
    return 500;
  }
}

createServer(async (request, response) => response.writeHead(await receive(request)).end()).listen(
  process.env.PORT ?? 3000,
  "127.0.0.1",
);

// Receive the worker's webhooks: `node receiver.mjs`. Each event has its effect once, however often it is delivered.
//
// Needs express, and Node 22.13 or later for its SQLite. Reads INTERNAL_API_TOKEN and WEBHOOK_SIGNING_SECRET, as the
// worker does (unset: signatures are not looked at); HOST (127.0.0.1) and PORT (8000); and DATABASE
// (receiver.sqlite3), which stands for the application's own. Prints every effect.

import { createHmac, timingSafeEqual } from 'node:crypto';
import { DatabaseSync } from 'node:sqlite';
import express from 'express';

const env = process.env;
const token = env.INTERNAL_API_TOKEN;
if (!token) throw new Error('INTERNAL_API_TOKEN is not set');
const secret = env.WEBHOOK_SIGNING_SECRET || '';
const key = secret.startsWith('whsec_') ? Buffer.from(secret.slice('whsec_'.length), 'base64') : Buffer.from(secret);
const TOLERANCE_SECONDS = 300;

const database = new DatabaseSync(env.DATABASE || 'receiver.sqlite3');
database.exec(`
  CREATE TABLE IF NOT EXISTS generations (id TEXT PRIMARY KEY, state TEXT NOT NULL, detail TEXT NOT NULL);
  CREATE TABLE IF NOT EXISTS webhooks (id TEXT PRIMARY KEY);
`);
const find = database.prepare('SELECT 1 FROM generations WHERE id = ?');
const expect = database.prepare(`INSERT INTO generations VALUES (?, 'published', '') ON CONFLICT DO NOTHING`);
const note = database.prepare('INSERT INTO webhooks VALUES (?) ON CONFLICT DO NOTHING');
const update = database.prepare('UPDATE generations SET state = ?, detail = ? WHERE id = ?');

function isEqual(given, wanted) {
  const [a, b] = [Buffer.from(given), Buffer.from(wanted)];
  return a.length === b.length && timingSafeEqual(a, b);
}

/** Whether one of the Standard Webhooks signatures is right and its time is near. */
function isSigned(request) {
  const timestamp = request.get('webhook-timestamp') ?? '';
  const distance = Math.abs(Date.now() / 1000 - Number(timestamp));
  if (!/^[0-9]+$/.test(timestamp) || distance > TOLERANCE_SECONDS) return false;
  // The body as it came: parsed and written again it would have another signature.
  const mac = createHmac('sha256', key).update(`${request.get('webhook-id')}.${timestamp}.`).update(request.body);
  const wanted = `v1,${mac.digest('base64')}`;
  return (request.get('webhook-signature') ?? '').split(' ').some((given) => isEqual(given, wanted));
}

// The worker tries a webhook again for a day after 401, so a token or a secret may be changed while it runs.
function checkToken(request, response, next) {
  if (isEqual(request.get('authorization') ?? '', `Bearer ${token}`)) next();
  else response.status(401).json({ detail: 'wrong token' });
}

function verify(request, response, next) {
  if (!secret || isSigned(request)) next();
  else response.status(401).json({ detail: 'wrong or old signature' });
}

/** One transaction: the effect, and the note that it was had. */
function actOnce(webhookId, state, generationId, detail) {
  database.exec('BEGIN IMMEDIATE');
  try {
    if (note.run(webhookId).changes === 1) {
      update.run(state, detail, generationId);
      console.log(state, generationId, detail);
    }
    database.exec('COMMIT');
  } catch (error) {
    database.exec('ROLLBACK');
    throw error;
  }
}

/** Answers a webhook. What takes long belongs into a queue: the worker waits twenty seconds, for progress five. */
function take(state, detailOf) {
  return (request, response) => {
    const body = JSON.parse(request.body);
    const generationId = String(body.generation_id); // a number or text, as it was published
    if (!find.get(generationId)) {
      response.status(404).json({ detail: 'no such generation yet' }); // tried again for a minute
      return;
    }
    actOnce(request.get('webhook-id'), state, generationId, detailOf(body));
    response.json({ success: true });
  };
}

const app = express();
app.use(checkToken);
// What an application does in the transaction after which it publishes the job.
app.put('/generations/:id', (request, response) => {
  expect.run(request.params.id);
  response.json({ success: true });
});
const webhook = [express.raw({ type: 'application/json', limit: '1mb' }), verify];
const handlers = {
  progress: take('progress', (body) => `${body.progress.progress_percent} %`),
  complete: take('complete', (body) => body.result_url),
  failed: take('failed', (body) => body.error_code),
};
app.patch('/api/webhooks/inference/progress', webhook, handlers.progress);
app.post('/api/webhooks/inference/complete', webhook, handlers.complete);
app.post('/api/webhooks/inference/failed', webhook, handlers.failed);
// For a worker with WEBHOOK_URL=/hooks/darkroom: every webhook, its kind in the signed body.
app.post('/hooks/darkroom', webhook, (request, response) => {
  handlers[JSON.parse(request.body).type](request, response);
});

app.listen(Number(env.PORT || 8000), env.HOST || '127.0.0.1');

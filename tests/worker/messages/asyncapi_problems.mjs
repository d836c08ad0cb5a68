// What AsyncAPI's own parser says of a document, as a JSON list: `node asyncapi_problems.mjs docs/asyncapi.yaml`.
import { Parser, fromFile } from '@asyncapi/parser';

const { document, diagnostics } = await fromFile(new Parser(), process.argv[2]).parse();
const problems = diagnostics.map(({ code, severity, message, path }) => ({ code, severity, message, path: path.join('.') }));
const channels = document?.channels().all().map((channel) => channel.address()) ?? [];
console.log(JSON.stringify({ problems, channels }));

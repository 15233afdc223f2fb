// The teacher gets our words and nothing else, once; what goes wrong comes back at once and as it was.
//
// OpenCode is made for agents: it puts its own prompt, the model's name, the folder and the date before every question,
// takes temperature and length from its configuration, tries a failed request six times by itself, and lets a model go
// on that stopped without saying why. Here each request brings its own system prompt and settings, as JSON in the
// message's `system` (foundry/opencode_client.py writes it), and retries are Foundry's affair. Without state: everything
// is read from the message it belongs to.

import { merged } from "./stream.js";

const AGENT = "foundry";
const MARK = '{"foundry":';
const OPTIONS = "x-foundry-options"; // a header between our hook and our fetch; the vendor does not see it

const settings = (system) => JSON.parse(system.slice(system.indexOf(MARK))).foundry;

// What a failure was goes into headers: OpenCode repeats a request whose body, or message, holds words such as
// "overloaded" or a number with 500 in it, and keeps the headers of an error as they are.
const failure = (status, text, headers = {}) =>
  Response.json(
    { error: { message: "The teacher did not answer; see the header x-foundry-status.", type: "foundry" } },
    {
      status: 400,
      headers: {
        "x-foundry-status": String(status),
        "x-foundry-message": encodeURIComponent(text.slice(0, 500).toWellFormed()),
        ...headers,
      },
    },
  );

// `fetch` of one provider. Vendors repeat keys in their errors: `secrets` are cut out.
const asking = (secrets) => async (input, init) => {
  const clean = (text) => secrets.reduce((rest, secret) => rest.replaceAll(secret, "***"), text);
  const headers = new Headers(init.headers);
  const options = headers.get(OPTIONS);
  headers.delete(OPTIONS);
  let body = init.body;
  let isStreamed = false;
  if (typeof body === "string") {
    const request = JSON.parse(body);
    // Our questions have one turn: with a second one OpenCode goes on where an answer ended without a reason.
    if (request.messages?.some(({ role }) => role === "assistant")) {
      return failure(200, "half an answer: it ended without saying why");
    }
    isStreamed = request.stream === true;
    if (options) body = JSON.stringify({ ...request, ...JSON.parse(decodeURIComponent(options)) });
  }
  let response, text;
  try {
    response = await fetch(input, { ...init, headers, body });
    text = await response.text();
  } catch (error) {
    if (init.signal?.aborted) throw error;
    const about = response ? "the answer broke off: " : "";
    return failure(0, clean(about + String(error?.message ?? error)));
  }
  if (!response.ok) {
    const wait = response.headers.get("retry-after");
    return failure(response.status, clean(text), wait ? { "retry-after": wait } : {});
  }
  const type = response.headers.get("content-type") ?? "";
  if (!isStreamed) return new Response(text, { headers: { "content-type": type } });
  // To an answer that is no stream OpenCode would wait for ever.
  if (!type.startsWith("text/event-stream")) return failure(200, clean(`no stream of events, but: ${text}`));
  return new Response(merged(text), { headers: { "content-type": type } });
};

export const FoundryPlugin = async () => ({
  config: async (config) => {
    for (const provider of Object.values(config.provider ?? {})) {
      const { apiKey, headers } = provider.options ?? {};
      const secrets = [apiKey, ...Object.values(headers ?? {})].filter((secret) => secret?.length > 3);
      provider.options = { ...provider.options, fetch: asking(secrets) };
    }
    // Defined here and not in the configuration: where the agent is listed, this plugin is at work.
    config.agent = {
      ...config.agent,
      [AGENT]: {
        mode: "primary",
        description: "Foundry: the question and nothing else (2)",
        prompt: AGENT,
        permission: { "*": "deny" },
      },
    };
  },

  "experimental.chat.system.transform": async (_, output) => {
    const all = output.system.join("\n");
    if (!all.includes(MARK)) return;
    const { system } = settings(all);
    output.system.length = 0;
    if (system) output.system.push(system);
  },

  "chat.params": async (input, output) => {
    if (!input.message.system?.startsWith(MARK)) return;
    const { temperature, top_p, max_tokens } = settings(input.message.system);
    output.temperature = input.model.capabilities.temperature ? temperature : undefined;
    output.topP = top_p;
    output.topK = undefined;
    output.maxOutputTokens = max_tokens;
    output.options = {};
  },

  "chat.headers": async (input, output) => {
    if (!input.message.system?.startsWith(MARK)) return;
    const { options } = settings(input.message.system);
    if (Object.keys(options).length) output.headers[OPTIONS] = encodeURIComponent(JSON.stringify(options));
  },
});

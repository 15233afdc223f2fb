// Asks a server through Continue's adapters, of the providers that docs/editors.md names and the one that sends `suffix`.
import { readFileSync } from "node:fs";
import { constructLlmApi } from "@continuedev/openai-adapters";

const given = JSON.parse(readFileSync(0, "utf-8"));
const url = process.argv[2];
const { signal } = new AbortController();
const greedy = { model: "any", temperature: 0, max_tokens: 64 };
const messages = [{ role: "user", content: given.question }];
const openai = constructLlmApi({ provider: "openai", apiBase: url + "/v1/", apiKey: "none" });
const llamaCpp = constructLlmApi({ provider: "llama.cpp", apiBase: url + "/v1/", apiKey: "none" });
const llamaStack = constructLlmApi({ provider: "llamastack", apiBase: url + "/v1/", apiKey: "none" });

async function joined(stream, read) {
  let text = "";
  for await (const chunk of stream) text += chunk.choices.length ? (read(chunk.choices[0]) ?? "") : "";
  return text;
}

const text = (choice) => choice.text;
const delta = (choice) => choice.delta.content;
const gap = { prompt: given.prefix, suffix: given.suffix, ...greedy };
const refused = await joined(openai.fimStream(gap, signal), delta).catch((error) => error);
console.log(
  JSON.stringify({
    models: (await openai.list()).length,
    plain: (await openai.completionNonStream({ prompt: given.prompt, ...greedy }, signal)).choices[0].text,
    stream: await joined(openai.completionStream({ prompt: given.fim, stream: true, ...greedy }, signal), text),
    "stream, llama.cpp": await joined(
      llamaCpp.completionStream({ prompt: given.fim, stream: true, ...greedy }, signal), text),
    chat: (await openai.chatCompletionNonStream({ messages, ...greedy }, signal)).choices[0].message.content,
    "chat, stream": await joined(openai.chatCompletionStream({ messages, stream: true, ...greedy }, signal), delta),
    suffix: await joined(llamaStack.fimStream(gap, signal), delta),
    "fim/completions": refused instanceof Error ? "refused" : refused,
  }),
);

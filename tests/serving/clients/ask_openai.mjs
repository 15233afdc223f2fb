// Asks a server with OpenAI's package for Node.
import { readFileSync } from "node:fs";
import OpenAI from "openai";

const given = JSON.parse(readFileSync(0, "utf-8"));
const client = new OpenAI({ baseURL: process.argv[2] + "/v1", apiKey: "none", maxRetries: 0 });
const greedy = { model: "any", temperature: 0, max_tokens: 64 };
const messages = [{ role: "user", content: given.question }];

async function joined(stream, read) {
  let text = "";
  for await (const chunk of stream) text += chunk.choices.length ? (read(chunk.choices[0]) ?? "") : "";
  return text;
}

const plain = await client.completions.create({ prompt: given.prompt, ...greedy });
const chat = await client.chat.completions.create({ messages, ...greedy });
const mistake = await client.completions.create({ prompt: null, ...greedy }).catch((error) => error);
console.log(
  JSON.stringify({
    models: (await client.models.list()).data.length,
    plain: plain.choices[0].text,
    "plain, finish": plain.choices[0].finish_reason,
    suffix: (await client.completions.create({ prompt: given.prefix, suffix: given.suffix, ...greedy })).choices[0].text,
    stream: await joined(
      await client.completions.create({ prompt: given.fim, stream: true, ...greedy }), (choice) => choice.text),
    chat: chat.choices[0].message.content,
    "chat, stream": await joined(
      await client.chat.completions.create({ messages, stream: true, ...greedy }), (choice) => choice.delta.content),
    mistake: mistake instanceof OpenAI.BadRequestError,
  }),
);

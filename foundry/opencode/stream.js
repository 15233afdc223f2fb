// An answer comes as a stream of events, a word in each, and OpenCode spends about a millisecond on every one. Nobody
// reads along here, so neighbouring words of one kind are handed over as one event, events that say nothing are left
// out, and all else stays as it came.

const WORDS = ["content", "reasoning_content", "reasoning"];

// What an event says, if it is words alone: { kind, text, with(text) }; without a kind, if it says nothing at all.
// OpenAI's chunks and Anthropic's deltas.
const words = (event) => {
  const line = event.split("\n").find((part) => part.startsWith("data:"));
  let data;
  try {
    data = JSON.parse(line.slice(5));
  } catch {
    return null;
  }
  let place, name;
  if (data.type === "content_block_delta") {
    place = data.delta;
    name = { text_delta: "text", thinking_delta: "thinking" }[place?.type];
  } else if (data.choices?.length === 1 && !data.choices[0].finish_reason && !data.choices[0].logprobs && !data.usage) {
    place = data.choices[0].delta;
    const said = Object.keys(place ?? {}).filter((key) => key !== "role" && place[key] !== null && place[key] !== "");
    if (said.length === 0) return {};
    if (said.length === 1 && WORDS.includes(said[0])) [name] = said;
  }
  if (typeof place?.[name] !== "string") return null;
  return {
    kind: `${name} ${data.index}`,
    text: place[name],
    with: (text) => {
      place[name] = text;
      return event.replace(line, () => `data: ${JSON.stringify(data)}`);
    },
  };
};

export const merged = (stream) => {
  const out = [];
  let run = [];
  const flush = () => {
    if (run.length) out.push(run[0].with(run.map(({ text }) => text).join("")));
    run = [];
  };
  for (const event of stream.replaceAll("\r\n", "\n").split("\n\n")) {
    const said = words(event);
    if (said && !said.kind) continue;
    if (!said || said.kind !== run[0]?.kind) flush();
    if (said) run.push(said);
    else out.push(event);
  }
  flush();
  return out.join("\n\n");
};

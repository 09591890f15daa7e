// The npm package openai.
import OpenAI from "openai";
import { LENGTH, MESSAGES, MODEL, QUESTION, isEmbedding, joined, run } from "./features.mjs";

const client = new OpenAI();
const greedy = { model: MODEL, temperature: 0 };
const parameters = { type: "object", properties: { name: { enum: ["Ann", "Bob"] } }, required: ["name"], additionalProperties: false };

async function* deltas(stream) {
  for await (const chunk of stream) yield chunk.choices[0]?.delta.content;
}

async function* texts(stream) {
  for await (const event of stream) if (event.type === "response.output_text.delta") yield event.delta;
}

await run({
  chat: async () => {
    const answer = await client.chat.completions.create({ messages: MESSAGES, max_tokens: LENGTH, ...greedy });
    return answer.choices[0].message.content;
  },
  "chat, streamed": async () =>
    joined(deltas(await client.chat.completions.create({ messages: MESSAGES, max_tokens: LENGTH, stream: true, ...greedy }))),
  completions: async () =>
    (await client.completions.create({ prompt: "Once", max_tokens: LENGTH, ...greedy })).choices[0].text,
  responses: async () =>
    (await client.responses.create({ input: QUESTION, max_output_tokens: LENGTH, ...greedy })).output_text,
  "responses, streamed": async () =>
    joined(texts(await client.responses.create({ input: QUESTION, max_output_tokens: LENGTH, stream: true, ...greedy }))),
  "tools offered": async () => {
    const tools = [{ type: "function", function: { name: "look_up", parameters } }];
    const answer = await client.chat.completions.create({ messages: MESSAGES, max_tokens: LENGTH, tools, ...greedy });
    return answer.choices[0].message.content;
  },
  "structured output": () => {
    const format = { type: "json_schema", json_schema: { name: "person", schema: parameters, strict: true } };
    return client.chat.completions
      .parse({ messages: MESSAGES, response_format: format, ...greedy })
      .then((answer) => answer.choices[0].message.parsed.name);
  },
  embeddings: async () => {
    const answer = await client.embeddings.create({ model: MODEL, input: ["one", "two"] });
    return isEmbedding(answer.data.map((item) => item.embedding));
  },
});

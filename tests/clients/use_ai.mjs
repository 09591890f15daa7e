// The npm package ai (the AI SDK) with its provider for OpenAI: the newer API is its default.
import { createOpenAI } from "@ai-sdk/openai";
import { embedMany, generateObject, generateText, jsonSchema, streamText, tool } from "ai";
import { BASE_URL, LENGTH, MODEL, QUESTION, isEmbedding, joined, run } from "./features.mjs";

const server = createOpenAI({ baseURL: BASE_URL, apiKey: "none" });
const greedy = { prompt: QUESTION, temperature: 0, maxOutputTokens: LENGTH, maxRetries: 0 };
const schema = jsonSchema({ type: "object", properties: { name: { enum: ["Ann", "Bob"] } }, required: ["name"], additionalProperties: false });
const tools = { look_up: tool({ description: "Look a word up.", inputSchema: schema, execute: async () => "found" }) };

await run({
  chat: async () => (await generateText({ model: server.chat(MODEL), ...greedy })).text,
  "chat, streamed": async () => joined(streamText({ model: server.chat(MODEL), ...greedy }).textStream),
  completions: async () => (await generateText({ model: server.completion(MODEL), ...greedy })).text,
  responses: async () => (await generateText({ model: server(MODEL), ...greedy })).text,
  "responses, streamed": async () => joined(streamText({ model: server(MODEL), ...greedy }).textStream),
  "tools offered": async () => (await generateText({ model: server.chat(MODEL), tools, ...greedy })).text,
  "structured output": async () => (await generateObject({ model: server.chat(MODEL), schema, ...greedy })).object.name,
  embeddings: async () =>
    isEmbedding((await embedMany({ model: server.embedding(MODEL), values: ["one", "two"] })).embeddings),
});

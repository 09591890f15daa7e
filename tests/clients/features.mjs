// The same as features.py, for clients in JavaScript.
export const MODEL = process.env.MODEL;
export const BASE_URL = process.env.OPENAI_BASE_URL;
export const QUESTION = "Who are you?";
export const MESSAGES = [{ role: "user", content: QUESTION }];
export const LENGTH = 48;

export async function run(features) {
  const results = {};
  for (const [name, feature] of Object.entries(features)) {
    let outcome = "yes", detail = "";
    try {
      const result = (results[name] = await feature());
      if (!result) throw new Error("nothing came back");
      const same = results[name.replace(", streamed", "")];
      if (result !== same) throw new Error(`${JSON.stringify(result)} instead of ${JSON.stringify(same)}`);
    } catch (error) {
      outcome = "FAILED";
      detail = `${error.name}: ${error.message}`;
    }
    console.log("\n" + JSON.stringify({ feature: name, outcome, detail: detail.slice(0, 1000) }));
  }
}

export async function joined(parts) {
  let text = "";
  for await (const part of parts) text += part ?? "";
  return text;
}

export const isEmbedding = (vectors) =>
  vectors.every((vector) => vector.length > 1 && Math.abs(Math.hypot(...vector) - 1) < 1e-4);

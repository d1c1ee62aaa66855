// The server's API: what it can do, and requests for texts and states.

import { events } from "./events.js";

export class ApiError extends Error {
  constructor(status, body, retryAfter) {
    const error = body?.error ?? {};
    super(error.message ?? `the server answered with status ${status}`);
    Object.assign(this, { status, code: error.code ?? null, param: error.param ?? null, retryAfter });
  }
}

export class Api {
  constructor(key = "") {
    this.key = key;
    this.model = {}; // what /playground/model.json says
    this.can = { states: false, logprobs: false, chat: false, chatStates: false };
  }

  async request(path, { method = "GET", body, signal } = {}) {
    const headers = { Accept: "application/json, text/event-stream" };
    if (this.key) headers.Authorization = `Bearer ${this.key}`;
    if (body !== undefined) headers["Content-Type"] = "application/json";
    const response = await fetch(path, {
      method, headers, signal, cache: "no-store", body: body === undefined ? undefined : JSON.stringify(body),
    });
    if (!response.ok) {
      const text = await response.text();
      let parsed = null;
      try { parsed = JSON.parse(text); } catch { /* a proxy's page */ }
      throw new ApiError(response.status, parsed, response.headers.get("Retry-After"));
    }
    return response;
  }

  /** Learn what the server offers from its OpenAPI document. Throws an ApiError where it is not ready. */
  async connect() {
    this.model = await (await this.request("/playground/model.json")).json();
    const paths = (await (await this.request("/openapi.json")).json()).paths;
    const fields = (path) => {
      const content = paths[path]?.post?.requestBody?.content?.["application/json"]?.schema;
      return content?.properties ?? {};
    };
    this.can = {
      states: "keep_state" in fields("/v1/completions") && this.model.states,
      logprobs: JSON.stringify(fields("/v1/completions").logprobs ?? {}).includes('"integer"'),
      chat: "/v1/chat/completions" in paths && this.model.chat_template,
      chatStates: "keep_state" in fields("/v1/chat/completions") && this.model.states,
    };
  }

  /**
   * Stream a text. Yields {text, tokens: [{text, logprob, others: [{text, logprob}]}], finish, state, usage}.
   * `path` is that of completions or of chat completions.
   */
  async *stream(path, body, signal) {
    const response = await this.request(path, { method: "POST", body: { ...body, stream: true }, signal });
    for await (const event of events(response)) {
      if (event.error) throw new ApiError(500, event);
      const choice = event.choices?.[0];
      yield {
        text: choice?.text ?? choice?.delta?.content ?? "",
        reasoning: choice?.delta?.reasoning_content ?? "",
        tokens: readTokens(choice?.logprobs),
        finish: choice?.finish_reason ?? null,
        state: readState(choice) ?? readState(event),
        usage: event.usage ?? null,
      };
    }
  }

  /** {id, bytes, tokens} of a state that has read `body.prompt`, after `body.state` where there is one. */
  async createState(body, signal) {
    return await (await this.request("/v1/states", { method: "POST", body, signal })).json();
  }

  async deleteState(id) {
    await this.request(`/v1/states/${encodeURIComponent(id)}`, { method: "DELETE" });
  }
}

function readState(part) {
  const state = part?.state;
  if (!state) return null;
  return typeof state === "string" ? { id: state } : state;
}

/** Tokens of either API's log-probabilities. */
export function readTokens(logprobs) {
  if (!logprobs) return [];
  if (logprobs.content) {
    return logprobs.content.map((one) => ({
      text: one.token, logprob: one.logprob,
      others: (one.top_logprobs ?? []).map((other) => ({ text: other.token, logprob: other.logprob })),
    }));
  }
  return (logprobs.tokens ?? []).map((text, i) => ({
    text, logprob: logprobs.token_logprobs?.[i] ?? null,
    others: Object.entries(logprobs.top_logprobs?.[i] ?? {})
      .map(([other, logprob]) => ({ text: other, logprob })).sort((a, b) => b.logprob - a.logprob),
  }));
}

// Writes a node: makes the request for what follows its parent, streams it into the node, and keeps its state.

import { ApiError } from "./api.js";

const ALTERNATIVES = 5;
const PLAIN = { user: "User: ", assistant: "Assistant: ", system: "" };

/** The turns on the way to a node as plain text, for a model without a chat template. */
export function plainTurns(path) {
  return path.map((node) => `${PLAIN[node.role]}${node.text.trim()}\n`).join("") + PLAIN.assistant.trimEnd();
}

/** A reply's blanks before its first word are the prompt's, not its own. */
function trimStart(piece) {
  piece.text = piece.text.trimStart();
  if (piece.tokens.length) piece.tokens[0] = { ...piece.tokens[0], text: piece.tokens[0].text.trimStart() };
}

export class Writer {
  constructor(api) {
    this.api = api;
    this.abort = null;
    this.rate = 0;
  }

  get busy() { return this.abort !== null; }

  stop() { this.abort?.abort(); }

  /**
   * Fill `node` of `tree`, whose text is empty, with what follows its parent. `progress()` is called as it grows.
   * Resolves when the text has ended or was stopped; rejects with an ApiError.
   */
  async write(tree, node, settings, progress) {
    this.abort = new AbortController();
    const began = performance.now();
    let first = 0, tokens = 0;
    try {
      const { path, body } = this.#request(tree, node, settings);
      for await (const piece of this.#withStates(tree, node, path, body)) {
        if (node.role === "assistant" && !node.text) trimStart(piece);
        if (!first && (piece.text || piece.tokens.length)) first = performance.now();
        node.text += piece.text;
        node.tokens.push(...piece.tokens);
        tokens += piece.tokens.length || (piece.text ? 1 : 0);
        if (piece.usage) {
          tokens = piece.usage.completion_tokens;
          node.read = piece.usage.prompt_tokens + tokens;
          node.cached = piece.usage.prompt_tokens_details?.cached_tokens ?? 0;
        }
        if (piece.state) {
          node.state = piece.state.id;
          node.stateBytes = piece.state.bytes ?? undefined;
          node.read = piece.state.tokens ?? node.read;
        }
        if (piece.finish) node.finish = piece.finish;
        const seconds = (performance.now() - first) / 1000;
        if (first && tokens > 1 && seconds > 0) this.rate = (tokens - 1) / seconds;
        progress();
      }
      node.firstSeconds = first ? (first - began) / 1000 : null;
    } catch (error) {
      if (error.name !== "AbortError") throw error;
      node.finish = "stopped";
    } finally {
      this.abort = null;
      progress();
    }
  }

  #request(tree, node, settings) {
    const common = { ...settings.sampling, stream_options: { include_usage: true } };
    if (node.role === "assistant" && this.api.can.chat) {
      const messages = tree.path(node.parent).map(({ role, text }) => ({ role, content: text }));
      const body = { ...common, messages };
      if (this.api.can.logprobs) Object.assign(body, { logprobs: true, top_logprobs: ALTERNATIVES });
      if (this.api.can.chatStates) body.keep_state = true;
      return { path: "/v1/chat/completions", body };
    }
    const body = { ...common };
    if (node.role === "assistant") {
      body.prompt = plainTurns(tree.path(node.parent));
      body.stop = [...(body.stop ?? []), "\nUser:"];
    } else {
      body.prompt = tree.textTo(node.parent);
    }
    if (this.api.can.logprobs) body.logprobs = ALTERNATIVES;
    if (this.api.can.states) {
      body.keep_state = true;
      if (node.role === "model") this.#startFrom(tree, node, body);
    }
    return { path: "/v1/completions", body };
  }

  /** Begin at the nearest state before the node, so that only what came since is read. */
  #startFrom(tree, node, body) {
    const { state, text } = tree.since(node.parent);
    if (state !== null) {
      body.state = state;
      body.prompt = text;
    }
  }

  /** The stream; where a state is gone, once more from the whole text. */
  async *#withStates(tree, node, path, body) {
    let begun = false;
    try {
      for await (const piece of this.api.stream(path, body, this.abort.signal)) { begun = true; yield piece; }
    } catch (error) {
      const gone = error instanceof ApiError && !begun && body.state && [404, 410].includes(error.status);
      if (!gone) throw error;
      for (const one of tree.path(node.parent)) if (one.state === body.state) one.state = null;
      const { state, ...rest } = body;
      rest.prompt = tree.textTo(node.parent);
      yield* this.api.stream(path, rest, this.abort.signal);
    }
  }
}

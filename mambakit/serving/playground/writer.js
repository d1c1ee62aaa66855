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

/** The turns of a path as the API's messages; only those after `known`, where that is given. */
function messages(path, known = null) {
  return path.slice(known === null ? 0 : path.indexOf(known) + 1).map(({ role, text }) => ({ role, content: text }));
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
      if (node.role === "model") await this.#keepParent(tree, node);
      const { path, body } = this.#request(tree, node, settings);
      for await (const piece of this.#withStates(tree, node, path, body)) {
        if (node.role === "assistant" && !node.text) trimStart(piece);
        if (!first && (piece.text || piece.tokens.length)) first = performance.now();
        node.text += piece.text;
        node.tokens.push(...piece.tokens);
        tokens += piece.tokens.length || (piece.text ? 1 : 0);
        if (piece.usage) {
          tokens = piece.usage.completion_tokens;
          if (!node.state) node.read = piece.usage.prompt_tokens + tokens; // a state says itself what it has read
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
      const body = { ...common, messages: messages(tree.path(node.parent)) };
      if (this.api.can.logprobs) Object.assign(body, { logprobs: true, top_logprobs: ALTERNATIVES });
      if (this.api.can.chatStates) {
        body.keep_state = true;
        const { node: known, state } = tree.since(node.parent);
        if (state !== null) Object.assign(body, { state, messages: messages(tree.path(node.parent), known) });
      }
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

  /** Have the node's parent leave a state, so that each of its continuations begins there. */
  async #keepParent(tree, node) {
    const parent = tree.get(node.parent), { state, text } = tree.since(parent.id);
    if (!this.api.can.states || parent.state || !text) return;
    try {
      const kept = await this.api.createState(state === null ? { prompt: text } : { prompt: text, state }, this.abort.signal);
      Object.assign(parent, { state: kept.id, stateBytes: kept.bytes, read: kept.tokens });
    } catch (error) {
      if (error.name === "AbortError") throw error; // without a state the text itself is sent
    }
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
      if (rest.messages) rest.messages = messages(tree.path(node.parent));
      else rest.prompt = tree.textTo(node.parent);
      yield* this.api.stream(path, rest, this.abort.signal);
    }
  }
}

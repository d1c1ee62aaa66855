// Tokens in a text: which characters each of them has, their colour, and the others that could have stood there.

/**
 * Parts of `text` with the token of each: [{text, token, index}]. A token whose spelling is not in the text (bytes of
 * a character that several tokens share) shares the part of the next one that is.
 */
export function align(text, tokens) {
  const parts = [];
  let at = 0, first = 0;
  tokens.forEach((token, index) => {
    const found = token.text ? text.indexOf(token.text, at) : -1;
    if (found < 0 || found - at > 16) return;
    if (found > at) parts.push({ text: text.slice(at, found), token: tokens[first], index: first });
    parts.push({ text: token.text, token, index });
    at = found + token.text.length;
    first = index + 1;
  });
  if (at < text.length) {
    const last = Math.min(first, tokens.length - 1);
    parts.push({ text: text.slice(at), token: tokens[last] ?? null, index: last });
  }
  return parts;
}

const MOST_BITS = 8; // a token as unlikely as one in 256, or more, has the full colour

const bits = (logprob) => -logprob / Math.LN2;

export function percent(logprob) {
  const p = Math.exp(logprob) * 100;
  return p >= 10 ? `${p.toFixed(0)} %` : p >= 0.1 ? `${p.toFixed(1)} %` : "< 0.1 %";
}

/** Spans for a node's text; each token's has data-index. */
export function tokenSpans(node) {
  return align(node.text, node.tokens).map(({ text, token, index }) => {
    const span = document.createElement("span");
    span.textContent = text;
    if (token && token.logprob !== null) {
      span.className = "token";
      span.dataset.index = index;
      span.dataset.node = node.id;
      span.style.setProperty("--surprise-share", Math.min(1, bits(token.logprob) / MOST_BITS).toFixed(3));
    }
    return span;
  });
}

export class Popover {
  /** `choose(nodeId, index, other)` is called where another token is picked. */
  constructor(element, choose) {
    this.element = element;
    this.choose = choose;
    this.timer = null;
    element.addEventListener("mouseenter", () => clearTimeout(this.timer));
    element.addEventListener("mouseleave", () => this.later());
  }

  show(span, node) {
    clearTimeout(this.timer);
    const index = Number(span.dataset.index), token = node.tokens[index];
    const others = token.others.some((other) => other.text === token.text)
      ? token.others : [...token.others, { text: token.text, logprob: token.logprob }];
    const head = document.createElement("p");
    head.textContent = `${percent(token.logprob)}, ${bits(token.logprob).toFixed(1)} bits. Pick another to fork here:`;
    const buttons = others.map((other) => {
      const button = document.createElement("button"), code = document.createElement("code"), p = document.createElement("span");
      code.textContent = other.text.replaceAll("\n", "⏎").replaceAll(" ", "·") || "∅";
      p.textContent = percent(other.logprob);
      button.append(code, p);
      if (other.text === token.text) button.className = "chosen";
      button.addEventListener("click", () => { this.hide(); this.choose(node.id, index, other); });
      return button;
    });
    this.element.replaceChildren(head, ...buttons);
    this.element.hidden = false;
    const place = span.getBoundingClientRect(), own = this.element.getBoundingClientRect();
    const below = place.bottom + 4 + own.height < innerHeight;
    this.element.style.left = `${Math.max(4, Math.min(place.left, innerWidth - own.width - 4))}px`;
    this.element.style.top = `${below ? place.bottom + 4 : Math.max(4, place.top - own.height - 4)}px`;
  }

  later() { clearTimeout(this.timer); this.timer = setTimeout(() => this.hide(), 250); }

  hide() { clearTimeout(this.timer); this.element.hidden = true; }
}

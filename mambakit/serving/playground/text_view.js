// The text on the way to the current node: parts that can be clicked into, and turns of a chat.

import { tokenSpans } from "./tokens.js";

const WHO = { user: "You", assistant: "Model", system: "System" };

export class TextView {
  /** `actions`: {edit(id), again(id), select(id)}. */
  constructor(element, popover, actions) {
    Object.assign(this, { element, popover, actions, tree: null });
    const token = (event) => event.target.closest?.(".token");
    element.addEventListener("mouseover", (event) => { if (token(event)) this.#hover(token(event)); });
    element.addEventListener("mouseout", (event) => { if (token(event)) popover.later(); });
    element.addEventListener("click", (event) => { // also where nothing hovers
      if (token(event) && !String(getSelection())) this.#hover(token(event));
    });
    element.addEventListener("dblclick", (event) => {
      const part = event.target.closest(".part");
      if (part) actions.select(Number(part.dataset.id));
    });
    element.addEventListener("scroll", () => popover.hide());
  }

  #hover(span) {
    const node = this.tree.get(Number(span.dataset.node));
    if (node?.tokens[Number(span.dataset.index)]?.others.length) this.popover.show(span, node);
  }

  show(tree, chat, colours, writing) {
    const { element } = this, path = tree.path(), atEnd = element.scrollHeight - element.scrollTop - element.clientHeight < 60;
    this.tree = tree;
    element.className = `${chat ? "chat" : "completion"}${colours ? "" : " plain"}`;
    if (!path.length) {
      const empty = document.createElement("p");
      empty.className = "empty";
      empty.textContent = chat ? "Say something." : "The text is empty. Write a beginning below.";
      element.replaceChildren(empty);
    } else {
      element.replaceChildren(...path.map((node) => (chat ? this.#turn(node, writing) : this.#part(node, tree, writing))));
    }
    if (atEnd) element.scrollTop = element.scrollHeight;
  }

  /** What a stream has added to the current node, without making the rest again. */
  grow(tree, chat, colours, writing) {
    const node = tree.get(tree.current), place = this.element.querySelector(`[data-id="${node.id}"]`);
    if (!place) { this.show(tree, chat, colours, writing); return; }
    const atEnd = this.element.scrollHeight - this.element.scrollTop - this.element.clientHeight < 60;
    place.replaceChildren(...this.#spans(node));
    if (atEnd) this.element.scrollTop = this.element.scrollHeight;
  }

  #spans(node) {
    return node.tokens.length ? tokenSpans(node) : [document.createTextNode(node.text)];
  }

  #part(node, tree, writing) {
    const span = document.createElement("span");
    span.className = `part ${node.role}`;
    span.dataset.id = node.id;
    if (node.id === tree.current && writing) span.dataset.current = "";
    span.append(...this.#spans(node));
    return span;
  }

  #turn(node, writing) {
    const turn = document.createElement("article"), who = document.createElement("div");
    turn.className = `turn ${node.role}`;
    who.className = "who";
    const name = document.createElement("span");
    name.textContent = WHO[node.role] ?? node.role;
    who.append(name);
    const button = (text, action) => {
      const one = document.createElement("button");
      one.textContent = text;
      one.disabled = writing;
      one.addEventListener("click", action);
      who.append(one);
    };
    button("edit", () => this.actions.edit(node.id));
    if (node.role === "assistant") button("again", () => this.actions.again(node.id));
    button("fork here", () => this.actions.select(node.id));
    turn.append(who, this.#part(node, this.tree, writing));
    return turn;
  }
}

// The tree of forks. A node is a part of a text: what was typed, or what the model wrote after its parent.

export class Tree {
  constructor(data = null) {
    this.nodes = new Map();
    this.next = 1;
    this.current = 0;
    this.nodes.set(0, { id: 0, parent: null, role: "root", text: "", tokens: [], state: null, children: [] });
    if (data) this.#load(data);
  }

  #load(data) {
    for (const node of data.nodes) {
      if (!this.nodes.has(node.parent) || this.nodes.has(node.id)) continue; // of a damaged copy
      this.nodes.set(node.id, { tokens: [], state: null, ...node, children: [] });
      this.nodes.get(node.parent).children.push(node.id);
      this.next = Math.max(this.next, node.id + 1);
    }
    this.current = this.nodes.has(data.current) ? data.current : 0;
  }

  toJSON() {
    const nodes = [...this.nodes.values()].filter((node) => node.id !== 0).map(({ children, ...node }) => node);
    return { nodes, current: this.current };
  }

  get(id) { return this.nodes.get(id); }

  /** A new node after `parent`, which becomes the current one. Roles: prompt, model, system, user, assistant. */
  add(parent, role, text = "", more = {}) {
    const node = { id: this.next++, parent, role, text, tokens: [], state: null, children: [], ...more };
    this.nodes.set(node.id, node);
    this.get(parent).children.push(node.id);
    this.current = node.id;
    return node;
  }

  /** The nodes from the first after the root to this one. */
  path(id = this.current) {
    const found = [];
    for (let node = this.get(id); node && node.id !== 0; node = this.get(node.parent)) found.unshift(node);
    return found;
  }

  textTo(id = this.current) { return this.path(id).map((node) => node.text).join(""); }

  /** {state, text}: the nearest state on the way to this node that is kept, or null, and what was written since. */
  since(id = this.current) {
    let text = "";
    for (const node of this.path(id).reverse()) {
      if (node.state) return { node, state: node.state, text };
      text = node.text + text;
    }
    return { node: null, state: null, text };
  }

  /** Delete a node and all after it. Returns the states that nothing has any more. */
  remove(id) {
    if (id === 0) return [];
    const gone = [];
    const visit = (one) => {
      const node = this.get(one);
      if (node.state) gone.push(node.state);
      node.children.forEach(visit);
      this.nodes.delete(one);
    };
    const parent = this.get(this.get(id).parent);
    parent.children = parent.children.filter((child) => child !== id);
    visit(id);
    if (!this.nodes.has(this.current)) this.current = parent.id;
    return gone;
  }

  parent() { this.current = this.get(this.current).parent ?? 0; }

  child() {
    const children = this.get(this.current).children;
    if (children.length) this.current = children[children.length - 1];
  }

  sibling(step) {
    const node = this.get(this.current);
    if (node.id === 0) return;
    const all = this.get(node.parent).children;
    this.current = all[(all.indexOf(node.id) + step + all.length) % all.length];
  }

  /** Tokens (or characters, where they are not known) on the longest and on all ways. */
  count(measure) {
    let longest = 0, all = 0, leaves = 0;
    const visit = (id, before) => {
      const node = this.get(id), total = before + measure(node);
      if (!node.children.length && id !== 0) { all += total; leaves += 1; longest = Math.max(longest, total); }
      node.children.forEach((child) => visit(child, total));
    };
    visit(0, 0);
    return { longest, all, leaves };
  }
}

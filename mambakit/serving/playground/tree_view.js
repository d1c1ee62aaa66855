// The tree of forks as a list that can be clicked and walked with the keyboard.

const SIGNS = { prompt: "✎", user: "✎", system: "⚙", model: "◆", assistant: "◆" };

export class TreeView {
  /** `select(id)` and `remove(id)` are called for the node that is meant. */
  constructor(list, tree, select, remove) {
    Object.assign(this, { list, tree, select, remove });
    list.addEventListener("click", (event) => {
      const item = event.target.closest(".node");
      if (item) this.select(Number(item.dataset.id));
    });
    list.addEventListener("keydown", (event) => this.#key(event));
  }

  show(tree = this.tree) {
    this.tree = tree;
    const onPath = new Set(tree.path().map((node) => node.id));
    const focused = this.list.contains(document.activeElement);
    const item = (id) => {
      const node = tree.get(id), li = document.createElement("li"), div = document.createElement("div");
      li.setAttribute("role", "treeitem");
      li.setAttribute("aria-selected", String(id === tree.current));
      if (node.children.length) li.setAttribute("aria-expanded", "true");
      div.className = `node${onPath.has(id) ? " path" : ""}${id === tree.current ? " current" : ""}`;
      div.dataset.id = id;
      div.tabIndex = id === tree.current ? 0 : -1;
      const sign = document.createElement("span"), label = document.createElement("span"), dot = document.createElement("span");
      sign.textContent = SIGNS[node.role];
      label.className = "label";
      label.textContent = node.text.trim().replace(/\s+/g, " ").slice(0, 60) || "…";
      dot.className = "dot";
      dot.textContent = node.state ? "●" : "";
      dot.title = node.state ? `a state of ${node.read ?? "?"} tokens is kept` : "";
      div.title = node.text.slice(0, 300);
      div.append(sign, label, dot);
      li.append(div);
      return li;
    };
    const fill = (parent, ids) => {
      for (const id of ids) {
        let node = tree.get(id);
        parent.append(item(id));
        while (node.children.length === 1) { // a chain of single children stays in one list: only forks make another
          node = tree.get(node.children[0]);
          const next = item(node.id);
          next.className = "chained";
          parent.append(next);
        }
        if (node.children.length > 1) {
          const group = document.createElement("ul");
          group.setAttribute("role", "group");
          fill(group, node.children);
          parent.lastElementChild.append(group);
        }
      }
    };
    this.list.replaceChildren();
    fill(this.list, tree.get(0).children);
    const current = this.list.querySelector(".current");
    if (focused && current) current.focus();
    current?.scrollIntoView({ block: "nearest" });
  }

  #key(event) {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const items = [...this.list.querySelectorAll(".node")];
    const at = items.indexOf(document.activeElement);
    const id = at < 0 ? 0 : Number(items[at].dataset.id);
    const to = {
      ArrowDown: items[at + 1]?.dataset.id, ArrowUp: items[at - 1]?.dataset.id,
      ArrowLeft: this.tree.get(id)?.parent, ArrowRight: this.tree.get(id)?.children[0],
      Home: items[0]?.dataset.id, End: items.at(-1)?.dataset.id,
    };
    if (event.key in to) {
      event.preventDefault();
      if (to[event.key]) this.select(Number(to[event.key]));
    } else if (event.key === "Delete" && id) {
      event.preventDefault();
      this.remove(id);
    }
  }
}

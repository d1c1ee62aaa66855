// What the states of all forks hold, against the keys and values of a Transformer of the same size.

export function bytes(n) {
  const units = ["B", "KB", "MB", "GB", "TB"];
  let unit = 0;
  while (n >= 1000 && unit < units.length - 1) { n /= 1000; unit += 1; }
  return `${n >= 100 || unit === 0 ? n.toFixed(0) : n.toFixed(1)} ${units[unit]}`;
}

/** {states, held, other, otherShared, tokens, leaves}: bytes, and what they are of. */
export function measure(tree, model) {
  const states = [...tree.nodes.values()].filter((node) => node.state);
  const held = states.reduce((sum, node) => sum + (node.stateBytes ?? model.state_bytes), 0);
  const tokensOf = (node) => node.tokens.length || Math.ceil(node.text.length / 4);
  const { all, longest, leaves } = tree.count(tokensOf);
  // A Transformer shares what forks have in common where its cache has pages.
  const shared = [...tree.nodes.values()].reduce((sum, node) => sum + tokensOf(node), 0);
  return {
    states: states.length, held, other: all * model.transformer_bytes_per_token,
    otherShared: shared * model.transformer_bytes_per_token, tokens: shared, longest, leaves,
  };
}

export function showMemory(section, tree, model) {
  if (!model.state_bytes) { section.replaceChildren(); return; }
  const found = measure(tree, model);
  const most = Math.max(found.held, found.otherShared, 1);
  const head = document.createElement("h2");
  head.textContent = "Memory";
  const row = (name, value) => {
    const div = document.createElement("div"), left = document.createElement("span"), right = document.createElement("span");
    div.className = "row";
    left.textContent = name;
    right.textContent = value;
    div.append(left, right);
    return div;
  };
  const bar = (share, kind) => {
    const outer = document.createElement("div"), inner = document.createElement("div");
    outer.className = `bar ${kind}`;
    inner.style.setProperty("--share", share);
    outer.append(inner);
    return outer;
  };
  const note = document.createElement("p");
  note.className = "quiet";
  const per = model.transformer_bytes_per_token, even = Math.ceil(model.state_bytes / per);
  note.textContent =
    `A state is ${bytes(model.state_bytes)} whatever it has read. A Transformer of ${Math.max(1, Math.floor(model.layers / 2))} layers of the same ` +
    `width holds ${bytes(per)} for each token: more than a state after ${even.toLocaleString("en")} tokens, and at ` +
    `100,000 tokens ${bytes(per * 100000)}.`;
  section.replaceChildren(
    head,
    row(`${found.states} ${found.states === 1 ? "state" : "states"}`, bytes(found.held)), bar(found.held / most, "own"),
    row(`Transformer, ${found.tokens.toLocaleString("en")} tokens`, bytes(found.otherShared)), bar(found.otherShared / most, "other"),
    note,
  );
}

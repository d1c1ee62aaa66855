// The page: a tree of forks, the text on the way to its current node, and a writer.

import { Api, ApiError } from "./api.js";
import { showMemory } from "./memory.js";
import { Settings, startTheme } from "./settings.js";
import { TextView } from "./text_view.js";
import { Popover } from "./tokens.js";
import { Tree } from "./tree.js";
import { TreeView } from "./tree_view.js";
import { Writer } from "./writer.js";

const $ = (id) => document.getElementById(id);
const input = $("input"), KEPT = "mambakit.tree";
const api = new Api(), writer = new Writer(api);
let mode = "completion", connected = false, editing = null;
const trees = { completion: new Tree(), chat: new Tree() };

const settings = new Settings($("settings"), () => {
  if (api.key !== settings.key) { api.key = settings.key; connect(); }
  show();
});
api.key = settings.key;
const popover = new Popover($("popover"), forkAtToken);
const treeView = new TreeView($("tree"), trees.completion, select, remove);
const textView = new TextView($("text"), popover, { edit, again, select });
startTheme($("theme"));

const tree = () => trees[mode];
const chat = () => mode === "chat";

function notice(text, error = false) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
  $("notice").classList.toggle("error", error);
}

function tell(error) {
  const wait = error instanceof ApiError && error.retryAfter ? ` Try again in ${error.retryAfter} s.` : "";
  notice(`${error.message}${wait}`, true);
  if (error.status === 401) { openPanel("settings-panel", true); $("key").focus(); }
}

async function connect() {
  try {
    await api.connect();
    connected = true;
    notice("");
    $("model").textContent = api.model.id;
    load();
  } catch (error) {
    connected = false;
    tell(error);
    if (!(error instanceof ApiError) || error.status === 503) setTimeout(connect, 2000);
  }
  show();
}

// -- what is kept in the browser ----------------------------------------------------------------------------------------

function save() {
  try { localStorage.setItem(KEPT, JSON.stringify({ model: api.model.id, trees, mode })); } catch { /* full, or none */ }
}

function load() {
  try {
    const found = JSON.parse(localStorage.getItem(KEPT) ?? "null");
    if (found?.model !== api.model.id) return;
    for (const name of Object.keys(trees)) trees[name] = new Tree(found.trees[name]);
    mode = found.mode === "chat" ? "chat" : "completion";
  } catch { /* not ours */ }
}

// -- showing ------------------------------------------------------------------------------------------------------------

function show() {
  const current = tree().get(tree().current), busy = writer.busy;
  treeView.show(tree());
  textView.show(tree(), chat(), settings.colours, busy);
  showMemory($("memory"), tree(), api.model);
  for (const name of ["completion", "chat"]) $(`mode-${name}`).setAttribute("aria-selected", String(mode === name));
  $("go").textContent = editing !== null ? "Fork" : chat() ? "Send" : "Continue";
  $("go").disabled = busy || !connected;
  $("stop").hidden = !busy;
  $("rate").textContent = writer.rate ? `${writer.rate.toFixed(writer.rate < 10 ? 1 : 0)} tok/s` : "";
  input.placeholder = chat() ? "Write a message" : current.id ? "Write what comes next, or nothing" :
    "Write a beginning, and let the model continue it";
  const parts = [];
  if (editing !== null) parts.push("editing makes a fork; Esc leaves it");
  else if (current.state) parts.push(`a state of ${current.read ?? "?"} tokens is kept here`);
  if (current.cached) parts.push(`${current.cached} tokens were known`);
  if (current.finish === "stopped") parts.push("stopped");
  if (chat() && connected && !api.can.chat) parts.push("no chat template: plain turns, User: and Assistant:");
  $("where").textContent = parts.join(" · ");
}

function openPanel(id, open) {
  const panel = $(id), button = $(id === "tree-panel" ? "show-tree" : "show-settings");
  const now = open ?? !panel.classList.contains("open");
  for (const one of document.querySelectorAll(".panel")) one.classList.toggle("open", one === panel && now);
  for (const one of ["show-tree", "show-settings"]) $(one).setAttribute("aria-expanded", String($(one) === button && now));
}

// -- doing --------------------------------------------------------------------------------------------------------------

async function write(parent, role) {
  if (writer.busy || !connected) return;
  popover.hide();
  notice("");
  const own = tree(), node = own.add(parent, role);
  let frame = 0;
  const work = writer.write(own, node, settings, () => {
    frame ||= requestAnimationFrame(() => {
      frame = 0;
      if (own === tree() && own.current === node.id) textView.grow(own, chat(), settings.colours, writer.busy);
      $("rate").textContent = writer.rate ? `${writer.rate.toFixed(writer.rate < 10 ? 1 : 0)} tok/s` : "";
    });
  });
  show();
  try {
    await work;
  } catch (error) {
    tell(error);
    if (!node.text) own.remove(node.id);
  }
  if (own.nodes.has(node.id) && !node.text && !node.state) own.remove(node.id);
  save();
  show();
}

function go() {
  if (writer.busy || !connected) return;
  const text = input.value, own = tree();
  const target = editing === null ? own.current : own.get(editing).parent;
  if (chat()) {
    if (!text.trim()) { input.focus(); return; }
    const role = editing === null ? "user" : own.get(editing).role;
    const node = own.add(target, role, text);
    clearInput();
    if (role === "assistant") { save(); show(); return; } // the model's words were changed: now it is the user's turn
    write(node.id, "assistant");
  } else {
    if (!text && target === 0) { input.focus(); return; }
    const node = text ? own.add(target, "prompt", text) : own.get(target);
    clearInput();
    write(node.id, "model");
  }
  if (matchMedia("(max-width: 60rem)").matches) input.blur();
}

function clearInput() { input.value = ""; editing = null; }

function select(id) {
  if (editing !== null) clearInput();
  tree().current = id;
  popover.hide();
  if (!writer.busy) save();
  show();
}

function edit(id) {
  if (writer.busy || !id) return;
  editing = id;
  input.value = tree().get(id).text;
  input.focus();
  show();
}

function again(id) {
  const node = tree().get(id);
  if (node && (node.role === "model" || node.role === "assistant")) write(node.parent, node.role);
}

/** A fork whose text is the node's before this token, then `other`; the model writes on from there. */
function forkAtToken(id, index, other) {
  if (writer.busy) return;
  const own = tree(), node = own.get(id), kept = node.tokens.slice(0, index);
  const before = kept.map((token) => token.text).join("");
  const text = node.text.startsWith(before) ? before + other.text : null;
  if (text === null) { notice("this token shares a character with its neighbours; pick another", true); return; }
  const token = { ...node.tokens[index], text: other.text, logprob: other.logprob };
  if (chat()) { // a reply is written again as a whole, from an edited one
    own.add(node.parent, node.role, text, { tokens: [...kept, token] });
    save();
    show();
    return;
  }
  const fork = own.add(node.parent, "model", text, { tokens: [...kept, token] });
  write(fork.id, "model");
}

function remove(id) {
  if (writer.busy) return;
  for (const state of tree().remove(id)) if (api.can.states) api.deleteState(state).catch(() => {});
  save();
  show();
}

function fresh() {
  clearInput();
  select(0);
  input.focus();
}

function setMode(name) {
  if (writer.busy) return;
  mode = name;
  clearInput();
  save();
  show();
}

// -- events -------------------------------------------------------------------------------------------------------------

$("composer").addEventListener("submit", (event) => { event.preventDefault(); go(); });
$("stop").addEventListener("click", () => writer.stop());
$("new").addEventListener("click", fresh);
$("clear").addEventListener("click", () => {
  if (writer.busy || !confirm("Delete all forks and their states?")) return;
  for (const child of [...tree().get(0).children]) remove(child);
  fresh();
});
$("mode-completion").addEventListener("click", () => setMode("completion"));
$("mode-chat").addEventListener("click", () => setMode("chat"));
$("show-tree").addEventListener("click", () => openPanel("tree-panel"));
$("show-settings").addEventListener("click", () => openPanel("settings-panel"));
document.querySelector("main").addEventListener("click", () => openPanel("tree-panel", false));

document.addEventListener("keydown", (event) => {
  const own = tree();
  const moves = { ArrowUp: () => own.parent(), ArrowDown: () => own.child(), ArrowLeft: () => own.sibling(-1), ArrowRight: () => own.sibling(1) };
  if (event.key === "Escape") {
    popover.hide();
    openPanel("tree-panel", false);
    if (writer.busy) writer.stop();
    else if (editing !== null) { clearInput(); show(); }
  } else if (event.key === "Enter" && (event.ctrlKey || event.metaKey || (chat() && event.target === input && !event.shiftKey))) {
    event.preventDefault();
    go();
  } else if (event.altKey && !event.ctrlKey && !event.metaKey && event.key in moves) {
    event.preventDefault();
    moves[event.key]();
    select(own.current);
  } else if (event.altKey && !event.ctrlKey && !event.metaKey) {
    const actions = { KeyE: () => edit(own.current), KeyR: () => again(own.current), KeyN: fresh };
    if (event.code in actions) { event.preventDefault(); actions[event.code](); }
  }
});

connect();

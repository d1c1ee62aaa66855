// Sampling settings, the theme and the key: read from the page, kept in the browser.

const KEPT = "mambakit.settings", THEME = "mambakit.theme", KEY = "mambakit.key";

function kept(storage, name) {
  try { return storage.getItem(name); } catch { return null; } // a browser that keeps nothing
}

function keep(storage, name, value) {
  try { storage.setItem(name, value); } catch { /* the page works without */ }
}

export class Settings {
  constructor(form, changed) {
    this.form = form;
    try {
      for (const [name, value] of Object.entries(JSON.parse(kept(localStorage, KEPT) ?? "{}"))) {
        const field = form.elements[name];
        if (field?.type === "checkbox") field.checked = value; else if (field) field.value = value;
      }
    } catch { /* not ours */ }
    form.elements.key.value = kept(sessionStorage, KEY) ?? "";
    form.addEventListener("input", () => { this.#show(); this.#keep(); changed(); });
    form.addEventListener("submit", (event) => event.preventDefault());
    this.#show();
  }

  #show() {
    for (const output of this.form.querySelectorAll("output")) {
      output.value = Number(this.form.elements[output.htmlFor.value].value).toFixed(2).replace(/\.?0+$/, "");
    }
  }

  #keep() {
    const values = {};
    for (const field of this.form.elements) {
      if (field.name && field.name !== "key") values[field.name] = field.type === "checkbox" ? field.checked : field.value;
    }
    keep(localStorage, KEPT, JSON.stringify(values));
    keep(sessionStorage, KEY, this.key); // until the tab is closed
  }

  get key() { return this.form.elements.key.value.trim(); }
  get colours() { return this.form.elements.colours.checked; }

  /** Fields of a request. */
  get sampling() {
    const fields = this.form.elements, number = (name) => Number(fields[name].value);
    const found = {
      temperature: number("temperature"), top_p: number("top_p"), repetition_penalty: number("repetition_penalty"),
      max_tokens: Math.max(1, Math.round(number("max_tokens")) || 120),
    };
    if (fields.seed.value !== "") found.seed = Math.round(number("seed"));
    if (fields.stops.value !== "") found.stop = [fields.stops.value.replaceAll("\\n", "\n")];
    return found;
  }
}

export function startTheme(button) {
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  const show = (theme) => { root.dataset.theme = theme; };
  show(kept(localStorage, THEME) ?? (system.matches ? "dark" : "light"));
  system.addEventListener("change", () => { if (!kept(localStorage, THEME)) show(system.matches ? "dark" : "light"); });
  button.addEventListener("click", () => {
    show(root.dataset.theme === "dark" ? "light" : "dark");
    keep(localStorage, THEME, root.dataset.theme);
  });
}

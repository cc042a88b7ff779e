"use strict";
// Captures by prompt, and a button that opens a list of options with a search field.

/** Captures by prompt: the samples of a prompt together, any other by itself, each group with the `id` of the prompt. */
tl.byPrompt = (captures) => {
  const groups = new Map();
  for (const each of captures) {
    const key = each.sample ? `samples of ${each.prompt}` : each.id;
    if (!groups.has(key)) groups.set(key, { id: each.sample ? each.prompt : each.id, text: each.text, samples: [], captures: [] });
    groups.get(key).captures.push(each);
    if (each.sample) groups.get(key).samples.push(each);
  }
  return [...groups.values()];
};

/** The group of a capture, where it is one of several samples; else undefined. */
tl.samplesWith = (captures, id) => tl.byPrompt(captures).find((group) => group.samples.some((each) => each.id === id));

// A button that opens a list of options with a search field.
tl.picker = (label, { options, value, choose }) => {
  const { element } = tl;
  let at = 0, found = [];
  const shown = options.find((option) => option.value === value);
  const text = element("span", {}, shown ? shown.text : value || "none");
  const button = element("button", { "aria-haspopup": "listbox", "aria-label": label, onclick: () => (box.hidden ? open() : close()) },
    element("small", {}, label), text);
  const search = element("input", { type: "search", placeholder: `search ${label}`, "aria-label": `Search ${label}`, oninput: list, onkeydown: onKey });
  const items = element("ul", { role: "listbox" });
  const box = element("div", { className: "box", hidden: true }, search, items);
  const whole = element("div", { className: "picker" }, button, box);

  function list() {
    const words = search.value.toLowerCase().split(/\s+/);
    found = options.filter((option) => words.every((word) => `${option.text} ${option.note || ""}`.toLowerCase().includes(word)));
    at = Math.max(0, found.findIndex((option) => option.value === value));
    items.replaceChildren(...found.map((option, index) => element("li", { role: "option", onclick: () => take(index) },
      option.text, option.note ? element("small", {}, option.note) : null)));
    if (!found.length) items.replaceChildren(element("li", { className: "note" }, "no match"));
    mark();
  }
  function mark() {
    [...items.children].forEach((item, index) => {
      item.classList.toggle("at", index === at);
      item.setAttribute("aria-selected", index === at);
    });
    items.children[at]?.scrollIntoView({ block: "nearest" });
  }
  function open() {
    box.hidden = false;
    search.value = "";
    list();
    search.focus();
    addEventListener("pointerdown", outside);
  }
  function close() {
    box.hidden = true;
    removeEventListener("pointerdown", outside);
  }
  function outside(event) {
    if (!whole.contains(event.target)) close();
  }
  function take(index) {
    if (!found[index]) return;
    close();
    button.focus();
    choose(found[index].value);
  }
  function onKey(event) {
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      at = Math.max(0, Math.min(found.length - 1, at + (event.key === "ArrowDown" ? 1 : -1)));
      mark();
    } else if (event.key === "Enter") take(at);
    else if (event.key === "Escape") {
      close();
      button.focus();
    } else return;
    event.preventDefault();
    event.stopPropagation();
  }
  whole.openPicker = open;
  return whole;
};

"use strict";
// Notes on tokens: below the text, marked in it, made and changed here where the server takes them.
tl.notes = (box, strip) => {
  const { element, source } = tl;
  const head = element("div", { className: "notes-head" }), writing = element("div"), list = element("ul"), said = element("div", { role: "status" });
  box.append(head, writing, list, said);
  let state = null, data = null, found = null, form = null, problem = "", latest = 0;

  const place = ({ start, stop }) => (stop - start > 1 ? `${start}\u2013${stop - 1}` : String(start));

  async function send(change) {
    try {
      await change();
      form = null;
      problem = "";
    } catch (error) {
      problem = error.message;
    }
    await refresh();
    if (!form) head.querySelector("[data-add]")?.focus();
  }

  /** The form of a new note, or of one that is changed. */
  function opened({ note = null, start, stop }) {
    const from = element("input", { type: "number", min: 0, max: data.tokens.length - 1, value: start, disabled: Boolean(note), "aria-label": "from token" });
    const to = element("input", { type: "number", min: 0, max: data.tokens.length - 1, value: stop - 1, disabled: Boolean(note), "aria-label": "to token" });
    const text = element("textarea", { rows: 3, maxLength: 10000, dir: "auto", required: true, "aria-label": "note" });
    text.value = note?.text ?? "";
    const quoted = element("q", { dir: "auto" });
    const quote = () => { quoted.textContent = tl.visible(data.tokens.slice(Number(from.value), Number(to.value) + 1).join("")); };
    from.addEventListener("input", quote);
    to.addEventListener("input", quote);
    quote();
    const save = () => (note ? source.changeNote(state, note, text.value) : source.addNote(state, { start: Number(from.value), stop: Number(to.value) + 1, text: text.value }));
    const made = element("form", {
      className: "note-form",
      onsubmit: (event) => { event.preventDefault(); send(save); },
      onkeydown: (event) => { if (event.key === "Escape") close(); else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) made.requestSubmit(); else return; event.stopPropagation(); },
    }, element("div", {}, element("label", {}, "from token ", from), element("label", {}, " to ", to), " ", quoted), text, element("div", {}, element("button", { type: "submit" }, note ? "save" : "add"), " ", element("button", { type: "button", onclick: close }, "cancel")));
    return { made, text };
  }

  function open(what) {
    problem = "";
    form = opened(what);
    draw();
    form.text.focus();
  }

  function close() {
    form = null;
    problem = "";
    draw();
    head.querySelector("[data-add]")?.focus();
  }

  function row(note) {
    const act = found.closed ? [] : [element("button", { "aria-label": `change the note on ${place(note)}`, onclick: () => open({ note, ...note }) }, "change"), element("button", { "aria-label": `remove the note on ${place(note)}`, onclick: () => send(() => source.changeNote(state, note, null)) }, "remove")];
    return element("li", {}, element("button", { className: "on", title: "choose its first token", onclick: () => tl.state.set({ token: Math.min(note.start, data.tokens.length - 1) }) }, `${place(note)} ${tl.quoted(note.tokens.join(""))}`),
      element("p", { dir: "auto" }, note.text), note.is_current ? null : element("small", { className: "warning" }, "on tokens of an earlier capture"), element("small", { className: "when" }, note.updated.slice(0, 16).replace("T", " ")), ...act);
  }

  /** Show what is known; the form is left alone while it is open, since somebody types there. */
  function draw() {
    const { notes, closed, problems } = found, token = state.token ?? data.n_prompt_tokens;
    const add = closed || form ? [] : [element("button", { "data-add": "", title: "key a; with Shift, a click on another token takes all in between", onclick: () => begin() }, `note on token ${Math.min(token, data.tokens.length - 1)}`)];
    const told = closed && (notes.length || !source.exported) ? [element("span", { className: "note" }, closed)] : [];
    head.replaceChildren(...(notes.length ? [element("b", {}, `${notes.length} note${notes.length > 1 ? "s" : ""}`)] : []), ...add, ...told);
    if (!form) writing.replaceChildren();
    else if (writing.firstChild !== form.made) writing.replaceChildren(form.made);
    list.replaceChildren(...notes.map(row));
    said.replaceChildren(...[...(problem ? [problem] : []), ...problems].map((text) => tl.warning(text)));
    strip.note(new Map(notes.filter((note) => note.is_current).flatMap((note) => Array.from({ length: note.stop - note.start }, (_, index) => [note.start + index, note.text]))));
  }

  /** Open the form for a note on the chosen token. */
  function begin(start = Math.min(state?.token ?? data?.n_prompt_tokens ?? 0, (data?.tokens.length ?? 1) - 1), stop = start + 1) {
    if (found && !found.closed && data?.tokens && box.offsetParent) open({ start, stop });
  }

  async function refresh() {
    const asked = ++latest;
    const answer = await source.notes(state).catch((error) => ({ notes: [], closed: error.message, problems: [] }));
    if (asked !== latest) return; // a later one is on its way
    found = answer;
    draw();
  }

  return {
    begin,
    /** Open the form for a note on the tokens between the chosen one and another. */
    extend: (token) => begin(Math.min(token, state?.token ?? token), Math.max(token, state?.token ?? token) + 1),
    /** Show the notes of a capture, anew if it is another or `isNew`. */
    async update(now, next, isNew) {
      const before = state;
      state = now;
      if (!next?.tokens) return;
      if (next !== data || isNew || !found) {
        if (before?.prompt !== now.prompt || before?.set !== now.set || before?.experiment !== now.experiment) form = null;
        data = next;
        return refresh();
      }
      if (before?.token !== now.token) draw();
    },
  };
};

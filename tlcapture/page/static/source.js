"use strict";
// The source of the data: the server, one resource at a time, or the data embedded in an exported page.
tl.source = (() => {
  // Loops, since `from` with a function takes forty times as long for the millions of weights of a matrix.
  function bytesOf(text) {
    const characters = atob(text), bytes = new Uint8Array(characters.length);
    for (let at = 0; at < bytes.length; at += 1) bytes[at] = characters.charCodeAt(at);
    return bytes;
  }

  const KEPT = 48; // number of cached resources; an experiment has many more
  const kept = new Map();
  const carried = document.getElementById("exported");
  const exported = carried ? JSON.parse(new TextDecoder().decode(bytesOf(carried.textContent))) : null;

  class Missing extends Error {
    constructor({ what, command }) {
      super(what);
      this.command = command;
    }
  }

  async function fromServer(path) {
    let answer;
    try {
      answer = await fetch("api/" + path);
    } catch {
      throw new Missing({ what: "the server does not respond; restart it", command: await kept.get("root")?.then(({ option }) => `tlcapture view --experiment ${tl.state.now.experiment}${option}`) });
    }
    const value = await answer.json().catch(() => ({ what: `the server responded with status ${answer.status}` }));
    if (!answer.ok || value.absent) throw new Missing(value.absent ?? value);
    return value;
  }

  async function fromPage(path) {
    const name = decodeURIComponent(path), element = document.getElementById("data:" + name);
    if (!element) {
      if (name in exported.missing) throw new Missing(exported.missing[name]);
      throw new Missing({ what: "not included in this file", command: exported.command });
    }
    const unpacked = new Blob([bytesOf(element.textContent)]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(unpacked).json();
  }

  /** A prompt set in a subfolder as one part of a path. */
  const named = (set) => set.replaceAll("/", "~").replaceAll("@", "!");

  const pathOf = (...parts) => parts.map((part) => encodeURIComponent(part)).join("/");

  /** A promise of a resource, given the parts of its path; rejects with `Missing`. */
  function get(...parts) {
    const path = pathOf(...parts);
    let found = kept.get(path);
    if (found) kept.delete(path);
    else {
      found = exported ? fromPage(path) : fromServer(path);
      found.catch(() => kept.delete(path)); // allow another attempt
    }
    kept.set(path, found);
    if (kept.size > KEPT) kept.delete(kept.keys().next().value);
    return found;
  }

  /** A prompt whose tokens have `labels`: bytes of one character are called by it, and by which part of it they are. */
  function labelled(found) {
    if (!found.tokens) return found;
    const labels = [...found.tokens];
    for (const { start, stop, text } of found.joined ?? []) for (let at = start; at < stop; at += 1) labels[at] = `${text} ${at - start + 1}/${stop - start}`;
    return { ...found, labels };
  }

  /** A command that runs as it is shown: with the root, where that is not the folder the page is served from. */
  const command = (words) => get("root").then(({ option }) => words + option);

  /** The error for a prompt without a projection onto a trait. */
  async function notProjected(data, { experiment, set, trait }, where = "") {
    if (data.missing) return new Missing({ ...data.missing, what: where + data.missing.what });
    return new Missing({ what: `${where}not projected onto ${trait || "any trait"}`, command: await command(`tlcapture project --experiment ${experiment} --prompt-set ${set}`) });
  }

  const prompts = new WeakMap();
  const once = (found) => {
    if (!prompts.has(found)) prompts.set(found, labelled(found));
    return prompts.get(found);
  };

  const seen = new Map();
  let version = 0;

  /** Read everything anew, except what is known of the shown prompt, where nothing about that has changed. */
  async function forget({ experiment, set, prompt }) {
    const list = pathOf(experiment, "sets", named(set)), own = `${list}/${encodeURIComponent(prompt)}`;
    const before = await kept.get(list)?.catch(() => null), mine = await kept.get(own)?.catch(() => null);
    const all = [...kept];
    kept.clear();
    const after = await get(experiment, "sets", named(set)).catch(() => null), shown = ({ prompts: all }) => all.find((each) => String(each.id) === prompt);
    const of = (found) => JSON.stringify([found.traits, shown(found), shown(found)?.prompt && found.prompts.filter((each) => each.prompt === shown(found).prompt)]);
    if (mine && !mine.missing && before && after && of(before) === of(after)) for (const [path, found] of all) if (path === own || path.startsWith(`${own}/`)) kept.set(path, found);
    else version += 1;
  }

  /** Whether experiments, or the captures of the current set, have changed since the last call; if so, all is read anew. */
  async function isChanged({ experiment, set }) {
    let changed = false;
    for (const path of ["experiments", ...(experiment && set ? [pathOf(experiment, "sets", named(set))] : [])]) {
      const answer = await fetch("api/" + path).catch(() => null), text = answer?.ok ? await answer.text() : null;
      const shown = await kept.get(path)?.catch(() => null);
      if (text === null || (!seen.has(path) && !shown)) continue;
      if (seen.has(path) ? seen.get(path) !== text : JSON.stringify(shown) !== JSON.stringify(JSON.parse(text))) changed = true;
      seen.set(path, text);
    }
    if (changed) await forget(tl.state.now);
    return changed;
  }

  /** Change something on the server; rejects with what it says. */
  async function send(method, value, ...parts) {
    const path = pathOf(...parts);
    const answer = await fetch(`api/${path}`, { method, headers: { "Content-Type": "application/json" }, body: JSON.stringify(value) }).catch(() => null);
    const found = await answer?.json().catch(() => null);
    if (!answer?.ok) throw new Missing({ what: found?.what ?? "the server does not respond" });
    return found;
  }

  const notesOf = (state) => [state.experiment, "sets", named(state.set), state.prompt, "notes"];

  async function notes(state) {
    if (exported) return get(...notesOf(state)).catch(() => ({ notes: [], problems: [], closed: "an exported page takes no notes" }));
    return fromServer(pathOf(...notesOf(state)));
  }

  const ofPrompt = (state, ...rest) => get(state.experiment, "sets", named(state.set), state.prompt, ...rest);

  /** Numbers from base64 of float16. */
  function halves(text) {
    const bits = new Uint16Array(bytesOf(text).buffer);
    const valueOf = (half) => (half & 0x7c00 ? (1 + (half & 0x3ff) / 1024) * 2 ** (((half >> 10) & 31) - 15) : (half & 0x3ff) * 2 ** -24); // neither negative nor infinite
    const table = Float32Array.from({ length: 0x7c00 }, (_, half) => valueOf(half));
    const numbers = new Float32Array(bits.length);
    for (let at = 0; at < bits.length; at += 1) numbers[at] = table[bits[at]];
    return numbers;
  }

  /** A function of a prompt that remembers its last result, which is large. */
  function remembered(make) {
    let key = "", last = null;
    return (state, ...rest) => {
      const now = JSON.stringify([version, state.experiment, state.set, state.prompt, ...rest]);
      if (key !== now || !last) {
        key = now;
        last = make(state, ...rest);
        last.catch(() => { last = null; });
      }
      return last;
    };
  }

  /** The weights of one head, or of their mean. An exported page has those of all heads, token by token. */
  async function matrix(state, layer, head) {
    if (!exported) return ofPrompt(state, "matrix", layer, head).then(({ queries, weights }) => ({ queries, weights: halves(weights) }));
    const { positions, tokens } = await ofPrompt(state, "attention"), queries = positions ?? tokens.map((_, index) => index);
    const rows = [];
    for (const query of queries) {
      const { by_layer: layers } = await fromPage(pathOf(state.experiment, "sets", named(state.set), state.prompt, "attention", query)), heads = layers[layer];
      rows.push(head === "mean" ? heads[0].map((_, key) => heads.reduce((sum, weights) => sum + weights[key], 0) / heads.length) : heads[Number(head)]);
    }
    return { queries, weights: Float32Array.from(rows.flat()) };
  }

  return {
    exported,
    Missing,
    command,
    isChanged,
    notProjected,
    uncompared: (state) => get(state.experiment, "uncompared", named(state.set)),
    experiments: () => get("experiments"),
    promptSet: (experiment, set) => get(experiment, "sets", named(set)).then((found) => (
      { ...found, prompts: found.prompts.map((prompt) => ({ ...prompt, id: String(prompt.id) })) })),
    overview: (experiment, set, component) => get(experiment, "overviews", named(set), component),
    prompt: (state) => ofPrompt(state).then(once),
    samples: (state, prompt) => get(state.experiment, "sets", named(state.set), prompt, "samples", ...state.trait.split("/"), state.component),
    layers: (state) => ofPrompt(state, "layers", ...state.trait.split("/"), state.component),
    lens: (state) => ofPrompt(state, "lens"),
    lensToken: (state, token) => ofPrompt(state, "lens", token),
    attention: (state) => ofPrompt(state, "attention"),
    attentionToken: (state, token) => ofPrompt(state, "attention", token),
    attentionHeads: (state) => ofPrompt(state, "heads"),
    attentionMatrix: remembered(matrix),
    notes,
    addNote: (state, note) => send("POST", note, ...notesOf(state)),
    changeNote: (state, { id, revision }, text) => send("PUT", { revision, ...(text === null ? {} : { text }) }, ...notesOf(state), id),
    contributions: (state) => ofPrompt(state, "contributions"),
    internals: (state) => ofPrompt(state, "internals"),
    internalsLayer: (state, layer) => ofPrompt(state, "internals", layer),
    internalsToken: (state, layer, token) => ofPrompt(state, "internals", layer, token),
    atWork: (experiment, set) => fetch(`api/${pathOf(experiment, "running", named(set))}`).then((answer) => answer.json()).then(({ run }) => run ?? null),
    average: (experiment, set, trait, component) => get(experiment, "averages", named(set), ...trait.split("/"), component),
    comparisons: (experiment) => get(experiment, "compared"),
    comparedSet: (state, other) => get(state.experiment, "compared", other, named(state.set)),
    comparison: (state, other, name) => get(state.experiment, "compared", other, named(state.set), name),
    vectors: (state) => get(state.experiment, "vectors", ...state.trait.split("/")),
    crossTraits: (state, source) => get(state.experiment, "cross_traits", source),
  };
})();

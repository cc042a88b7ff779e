"use strict";
// The page: pickers, views, keyboard, and the text that all views share.
(() => {
  const { element, source, state } = tl;
  const VIEWS = Object.entries(tl.views);
  const SOON = 2000; // milliseconds that the first view waits to learn which trait stands out
  const byId = (id) => document.getElementById(id);
  const work = tl.work(byId("work"));
  const strip = tl.strip(byId("strip"), (token, isMore) => (isMore && state.now.token !== null ? notes.extend(token) : state.set({ token })));
  const notes = tl.notes(byId("notes"), strip);
  let pending = new Set(), held = null;
  let view = null, viewName = null, data = null, latest = 0, painted = { textOf: () => "", what: "" };

  tl.reading = {
    paint(colourOf, textOf, what, scale = null) {
      painted = { textOf, what, scale };
      strip.paint(colourOf, textOf);
      tellToken(state.now);
    },
  };

  function tellToken(now) {
    if (!data?.tokens) return;
    strip.choose(now.token ?? -1);
    if (now.token === null || now.token >= data.tokens.length) {
      byId("status").replaceChildren(painted.what ? `Colour: ${painted.what}. ` : "", "Choose a token with the mouse, or with the arrow keys when the text has the focus.", painted.scale ?? "");
      return;
    }
    const part = now.token < data.n_prompt_tokens ? "prompt" : "response", name = tl.spanNames(data.tokens.length, data.spans)[now.token];
    byId("status").replaceChildren("token ", element("b", {}, `${now.token} ${tl.quoted(data.labels[now.token])}`), ` of the ${part}${name ? `, ${name}` : ""}`,
      painted.what ? `; ${painted.what}: ` : "", element("b", {}, painted.textOf(now.token)), painted.scale ?? "");
  }

  const listed = ({ listed: { prompts }, changes }) => prompts.find((each) => each.id === changes.prompt);

  /** The whole text beside the tokens: the prompt as its set has it, and the response. */
  function showText(prompt, { text }) {
    const part = (label, shown) => (shown ? [element("h2", {}, label), element("p", { dir: "auto" }, shown)] : []);
    byId("text").replaceChildren(...part("prompt", prompt?.text), ...part("response", text));
  }

  /** Choose defaults for names that the address omits or that do not exist. */
  async function settle() {
    const [experiments] = await Promise.all([source.experiments(), source.command("")]);
    if (!experiments.length) throw new source.Missing({ what: "no experiments in this folder", command: await source.command("tlcapture capture --experiment my_exp --prompt-set single_trait") });
    const wanted = state.now, changes = {};
    const begin = document.documentElement.dataset;
    const named = experiments.find((each) => each.name === wanted.experiment);
    if (wanted.experiment && !named) return unknown(experiments, {}, `no experiment ${wanted.experiment} in this folder; there are: ${listOf(experiments.map((each) => each.name))}`);
    const experiment = named ?? experiments.find((each) => each.prompt_sets.length) ?? experiments[0];
    if (experiment.problem) return unknown(experiments, { experiment: experiment.name }, experiment.problem, experiment);
    if (!experiment.prompt_sets.length && wanted.view !== "vectors") {
      throw new source.Missing({ what: `experiment ${experiment.name} has no captures`, command: await source.command(`tlcapture capture --experiment ${experiment.name} --prompt-set single_trait`) });
    }
    changes.experiment = experiment.name;
    if (wanted.set && !experiment.prompt_sets.includes(wanted.set)) return unknown(experiments, changes, `${changes.experiment} has no captures of a set ${wanted.set}; captured sets: ${listOf(experiment.prompt_sets)}`, experiment);
    changes.set = experiment.prompt_sets.includes(wanted.set) ? wanted.set : experiment.prompt_sets[0] ?? "";
    const listed = changes.set ? await source.promptSet(changes.experiment, changes.set) : { prompts: [], traits: [] };
    const all = [...new Set([...listed.traits, ...experiment.traits])].sort();
    if (wanted.prompt && !listed.prompts.some((prompt) => prompt.id === wanted.prompt)) return unknown(experiments, changes, `${changes.experiment}/${changes.set} has no capture ${wanted.prompt}; captured: ${listOf(listed.prompts.map((prompt) => prompt.id))}`, experiment, listed);
    if (wanted.trait && !wanted.provisional && !all.includes(wanted.trait)) return unknown(experiments, changes, `${changes.experiment} has neither vectors of ${wanted.trait} nor projections onto it; traits: ${listOf(all)}`, experiment, listed);
    changes.prompt = listed.prompts.some((prompt) => prompt.id === wanted.prompt) ? wanted.prompt : listed.prompts[0]?.id ?? "";
    const traits = all, view = viewOf(wanted);
    const isChosen = traits.includes(wanted.trait) && !wanted.provisional;
    Object.assign(changes, isChosen ? { trait: wanted.trait } : view === "overview" ? { trait: "" } : await firstTrait(changes, experiment, listed, wanted));
    changes.view = view;
    delete begin.loading;
    return { experiments, listed, traits, changes };
  }

  const viewOf = ({ view, prompt }) => (tl.views[view] ? view : prompt ? "dynamics" : "overview");

  const listOf = (names) => (names.length > 12 ? `${names.slice(0, 12).join(", ")} and ${names.length - 12} more` : names.join(", ") || "none");

  /** What to show for an address that names what is not there: the address stays, and the pickers show what is. */
  function unknown(experiments, changes, what, experiment, listed = { prompts: [], traits: [] }) {
    return { experiments, listed, changes, traits: [...new Set([...listed.traits, ...(experiment?.traits ?? [])])].sort(), problem: new source.Missing({ what }) };
  }

  /** The trait that stands out most in the prompt or else in the set, or simply the first one, which stands in while that is not known. */
  async function firstTrait({ experiment: name, set, prompt }, experiment, listed, wanted) {
    const first = (wanted.view === "vectors" ? experiment.traits[0] : listed.traits[0]) ?? experiment.traits[0] ?? "";
    if (!listed.traits.length) return { trait: first };
    const found = source.overview(name, set, wanted.component).then(({ rows }) => outstanding(rows, prompt) ?? first, () => first);
    const trait = await Promise.race([found, new Promise((resolve) => setTimeout(resolve, wanted.provisional ? 0 : SOON, null))]);
    if (trait !== null) return { trait };
    found.then((known) => {
      const now = state.now;
      if (now.provisional && now.experiment === name && now.set === set && now.prompt === prompt) state.set({ trait: known }, { quietly: true });
    });
    return { trait: first, provisional: true };
  }

  function outstanding(rows, prompt) {
    const own = rows.find((row) => row.captures.includes(prompt)), most = rows.filter((row) => row.stands_out).sort((a, b) => b.rise - a.rise)[0];
    return own?.stands_out ? own.trait : most?.trait ?? own?.trait;
  }

  function drawHeader({ experiments, listed, traits }) {
    const now = state.now;
    const picker = (label, key, options, more = {}) => tl.picker(label, { options, value: now[key], choose: (value) => state.set({ ...more, [key]: value }) });
    const components = [...new Set((data?.projections ?? []).map((each) => each.component))].sort().reverse();
    const samples = tl.samplesWith(listed.prompts, now.prompt);
    byId("pickers").replaceChildren(
      picker("experiment", "experiment", experiments.map((each) => ({ value: each.name, text: each.name, note: `${each.prompt_sets.length} sets` })), { set: "", prompt: "", token: null }),
      picker("set", "set", (experiments.find((each) => each.name === now.experiment)?.prompt_sets ?? []).map((name) => ({ value: name, text: name })), { prompt: "", token: null }),
      element("div", { className: "picker" }, element("button", { "aria-label": "prompt: choose one in the overview", onclick: pick }, element("small", {}, "prompt"), tl.byPrompt(listed.prompts).find((group) => group.captures.some((each) => each.id === now.prompt))?.id ?? "none")),
      picker("trait", "trait", traits.map((trait) => ({ value: trait, text: trait }))),
      ...(now.provisional ? [element("span", { className: "note", role: "status" }, "finding the trait that stands out \u2026")] : []),
      ...(samples ? [picker("sample", "prompt", samples.samples.map((each) => ({ value: each.id, text: `${each.sample} of ${samples.samples.length}` })), { token: null })] : []),
      ...(data?.interventions ?? []).map((text) => element("span", { className: "intervention", title: `captured under an intervention: ${text}` }, text)),
      ...(components.length > 1 ? [tl.choice("of", components.map((each) => [each, each]), now.component, (component) => state.set({ component }))] : []));
    byId("views").replaceChildren(...VIEWS.map(([name, { title }], number) => element("button", { role: "tab", "aria-selected": name === now.view ? "true" : "false", title: `key ${number}`, onclick: () => state.set({ view: name }) }, title)));
    const themes = ["", "light", "dark"], next = themes[(themes.indexOf(now.theme) + 1) % themes.length];
    byId("tools").replaceChildren(
      ...(data?.tokens && data.n_prompt_tokens < data.tokens.length ? [tl.toggle("response only", now.response, (response) => state.set({ response }))] : []),
      element("button", { title: "light, dark, or system theme", onclick: () => state.set({ theme: next }, { quietly: true }) }, now.theme || "auto"),
      element("button", { title: "keys", "aria-label": "Keys", onclick: () => byId("help").showModal() }, "?"));
    document.title = `${now.set}/${now.prompt} ${now.trait} \u00b7 ${now.experiment} \u00b7 tlcapture`;
  }

  function fresh() {
    if (view) view.remove();
    byId("view").replaceChildren();
    view = null;
  }

  async function show(changed) {
    const round = ++latest, focused = document.activeElement;
    if (focused?.matches("button, select, input")) held = { name: nameOf(focused), at: namesakes(nameOf(focused)).indexOf(focused) };
    pending = changed = new Set([...pending, ...changed]); // including changes of superseded rounds
    const isLatest = () => round === latest;
    document.documentElement.dataset.theme = state.now.theme;
    document.documentElement.dataset.ready = "no";
    try {
      const settled = await settle();
      if (!isLatest()) return;
      state.set(settled.changes, { quietly: true });
      if (!isLatest()) return; // setting the state has started another round
      const now = state.now, Kind = tl.views[now.view];
      const before = data;
      if (settled.problem) {
        data = null;
        byId("reading").classList.add("without");
        throw settled.problem;
      }
      if (!source.exported && (changed.has("experiment") || changed.has("set"))) work.update(now);
      data = now.prompt ? await source.prompt(now).catch((error) => { if (Kind.withoutPrompt) return null; throw error; }) : null;
      if (!isLatest()) return;
      drawHeader(settled);
      const readable = Boolean(data?.tokens) && !Kind.ownText && !Kind.withoutPrompt;
      byId("reading").classList.toggle("without", !readable);
      if (data?.tokens && data !== before) {
        strip.show(data.tokens, data.n_prompt_tokens, data.spans, data.joined);
        showText(listed(settled), data);
      }
      notes.update(now, readable ? data : null, changed.has("data"));
      if (!data?.tokens && !Kind.withoutPrompt) throw new source.Missing(data?.missing ?? { what: "no data for this prompt" });
      if (viewName !== now.view || !view) {
        fresh();
        viewName = now.view;
        view = Kind.create(byId("view"));
        changed = new Set([...changed, "view"]);
      }
      const mine = view;
      byId("view").querySelector(".empty")?.remove();
      [...byId("view").children].forEach((child) => { child.hidden = false; });
      if (changed.size === 1 && changed.has("data") && data === before && data && !Kind.withoutPrompt) return done(); // others of the set are new
      tl.figure.tokens = data?.tokens && now.response && data.n_prompt_tokens < data.tokens.length ? [data.n_prompt_tokens, data.tokens.length] : null;
      await mine.update(now, changed, data);
      if (!isLatest()) return;
      tellToken(now);
      byId("view").querySelectorAll(".problem").forEach((old) => old.remove());
      byId("view").append(...[...(data?.problems ?? []), ...(data?.unread ?? [])].map((problem) => element("p", { className: "warning problem" }, problem)));
      done();
    } catch (error) {
      if (!isLatest()) return;
      fresh();
      strip.paint(() => "");
      painted = { textOf: () => "", what: "" };
      tellToken(state.now);
      byId("view").replaceChildren(tl.emptyState(error));
      const settled = await settle().catch(() => null);
      if (settled && isLatest()) drawHeader(settled);
      done();
    }
  }

  const nameOf = (each) => `${each.tagName} ${each.getAttribute("aria-label") ?? each.textContent}`;

  /** All controls of a name, which more than one may have. */
  const namesakes = (name) => [...document.querySelectorAll("header button, header select, main button, main select, main input")].filter((each) => nameOf(each) === name);

  /** Give the focus back to what was drawn anew, by its name. */
  function refocus() {
    if (document.activeElement === document.body && held) namesakes(held.name)[held.at]?.focus({ preventScroll: true });
    held = null;
  }

  function done() {
    pending = new Set();
    refocus();
    document.documentElement.dataset.shown = location.hash;
    document.documentElement.dataset.ready = "yes";
    if (performance.getEntriesByName("first view").length) return;
    performance.mark("first view");
    setTimeout(() => tl.plotly().catch(() => null), 500); // before the first figure is asked for
  }

  function move(key, by) {
    const now = state.now;
    if (!data?.tokens) return;
    const nLayers = data.n_layers ?? null;
    if (key === "token") {
      const from = now.token ?? (by > 0 ? data.n_prompt_tokens - 1 : data.n_prompt_tokens);
      state.set({ token: Math.max(0, Math.min(data.tokens.length - 1, from + by)) });
    } else if (key === "layer") {
      const own = tl.projectionOf(data, now)?.vector.layer ?? 0;
      const from = now.layer ?? own, kept = now.view === "layers" ? data.layers ?? null : null;
      if (kept) return state.set({ layer: (by > 0 ? kept.find((each) => each > from) : kept.findLast((each) => each < from)) ?? from });
      const layer = Math.max(0, from + by);
      state.set({ layer: nLayers === null ? layer : Math.min(nLayers - 1, layer) });
    } else state.set({ head: Math.max(0, now.head + by), mean: false });
  }

  async function step(by) {
    const { prompts } = await source.promptSet(state.now.experiment, state.now.set);
    const at = prompts.findIndex((prompt) => prompt.id === state.now.prompt) + by;
    if (prompts[at]) state.set({ prompt: prompts[at].id, token: null });
  }

  /** Choose a prompt in the overview, which then returns to this view. */
  async function pick() {
    if (state.now.view !== "overview") state.set({ view: "overview", from: state.now.view });
    for (let waited = 0; !byId("find") && waited < 100; waited += 1) await new Promise((resume) => setTimeout(resume, 20));
    byId("find")?.focus();
  }

  const open = (number) => byId("pickers").children[number]?.openPicker?.();
  const KEYS = {
    ArrowRight: [() => move("token", 1), "\u2190 \u2192", "token, when the text has the focus"], ArrowLeft: [() => move("token", -1)],
    ArrowUp: [() => move("layer", 1), "\u2191 \u2193", "layer, when the text has the focus"], ArrowDown: [() => move("layer", -1)],
    "]": [() => move("head", 1), "[ ]", "head"], "[": [() => move("head", -1)],
    n: [() => step(1), "n p", "next and previous prompt"], p: [() => step(-1)],
    "/": [pick, "/", "find a prompt"], t: [() => open(3), "t", "find a trait"],
    a: [() => notes.begin(), "a", "add a note on the chosen token"],
    "?": [() => byId("help").showModal(), "?", "this list"],
    ...Object.fromEntries(VIEWS.map(([name], number) => [String(number), [() => state.set({ view: name }), ...(number ? [] : [`0 \u2026 ${VIEWS.length - 1}`, "view"])]])),
  };
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select, textarea, dialog")) return;
    if (!KEYS[event.key] || (event.key.startsWith("Arrow") && !event.target.closest(".strip"))) return;
    event.preventDefault();
    KEYS[event.key][0]();
  });

  byId("help").append(element("h3", {}, "Keys"), element("table", {}, element("tbody", {}, Object.values(KEYS).filter(([, keys]) => keys).map(([, keys, what]) => element("tr", {}, element("td", {}, element("kbd", {}, keys)), element("td", {}, what))))),
    element("form", { method: "dialog" }, element("button", {}, "close")));
  if (source.exported?.note) document.querySelector("main").prepend(element("p", { className: "note", id: "left-out" }, source.exported.note));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => show(new Set(["theme"])));
  /** Show experiments and captures that are new since the last look. */
  let isDue = false;
  async function look() {
    if (!document.hidden) await work.update(state.now);
    if (!document.hidden && await source.isChanged(state.now)) isDue = true;
    if (isDue && !document.querySelector(".picker .box:not([hidden])") && document.documentElement.dataset.ready === "yes") {
      isDue = false;
      show(new Set(["data"]));
    }
    setTimeout(look, 3000);
  }
  if (!source.exported) setTimeout(look, 3000);

  state.onChange((now, changed) => show(changed));
  show(new Set(["view", "experiment", "set", "prompt", "trait", "theme"]));
})();

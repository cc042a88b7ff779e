"use strict";
// Overview: the prompts of a set by traits, with what stands out in each; a click opens the prompt.
tl.views = {};

/** How much a trait rose in a prompt, as text. */
tl.rise = (value) => (value === null || value === undefined ? "" : (value < 0 ? "\u2212" : "+") + Math.abs(value).toFixed(1));

tl.views.overview = {
  title: "Overview",
  withoutPrompt: true,
  create(container) {
    const { element, colours } = tl;
    const find = element("input", { type: "search", id: "find", placeholder: "find prompts, answers, traits", "aria-label": "Find prompts, answers or traits", oninput: () => tl.state.set({ find: find.value }, { quietly: true }), onkeydown: openFirst });
    const controls = element("div", { className: "controls" }), table = element("div", { className: "scrolled", tabIndex: 0, role: "region", "aria-label": "Prompts by traits" }), notes = element("div");
    container.append(controls, table, notes);
    const STEP = 200, PATIENCE = 250, LARGE = 500; // rows that are drawn at once; milliseconds for which the list of fewer prompts waits for what stands out
    let groups = [], rows = [], found = null, of = "", asked = null, reading = null, isGone = false;
    let listed = [], first = null, body = null, order = "";
    table.addEventListener("scroll", () => { if (table.scrollTop + table.clientHeight > table.scrollHeight - 800) drawMore(); });

    const open = (row, trait) => tl.state.set({
      view: tl.views[tl.state.now.from] ? tl.state.now.from : "dynamics", from: "", token: null,
      prompt: row.captures.includes(tl.state.now.prompt) ? tl.state.now.prompt : row.captures[0], ...(trait || row.stands_out ? { trait: trait ?? row.trait } : {}),
    });

    function openFirst(event) {
      if (event.key === "Enter" && first) open(first);
      else if (event.key === "Escape") find.value = "", tl.state.set({ find: "" }, { quietly: true });
    }

    const COLUMNS = {
      prompt: ["prompt", "The prompt, and the number of its samples.", null],
      top: ["stands out", "The trait that rose most in the response, if it rose more than chance.", (row) => (row.trait ? `${row.stands_out || row.chance === null ? 0 : 1}${row.trait}` : null)],
      rise: ["rise", "How much that trait rose from the prompt to the response, as a standard score: less the mean rise, in standard deviations.", (row) => row.rise ?? null],
      chance: ["chance", "What the largest of as many rises stays below in 95 % of random directions and of ordinary prompts. A larger rise stands out.", (row) => row.chance ?? null],
      answer: ["answer", "The first words of the response.", (row) => row.answer || null],
    };

    const TIE = 0.005; // standard deviations, the rounding of random rises

    /** Whether it is not known how much a trait of a row rises by chance. */
    const isUnknown = (row, trait) => row.chance === null || row.unmeasured?.includes(trait);

    /** Whether a trait of a row rose more than chance. */
    const standsOut = (row, trait) => !isUnknown(row, trait) && row.rises[trait] > row.chance + TIE;

    const valueOf = (row, key) => (COLUMNS[key] ? COLUMNS[key][2]?.(row) : row.rises?.[key]) ?? null;

    function sorted(listed, { sort }) {
      const down = sort.startsWith("-"), key = sort.replace("-", "");
      if (!key || key === "prompt") return down ? [...listed].reverse() : listed;
      const known = listed.filter((row) => valueOf(row, key) !== null), rest = listed.filter((row) => valueOf(row, key) === null);
      const order = (a, b) => (typeof a === "number" ? a - b : String(a).localeCompare(String(b)));
      known.sort((a, b) => order(valueOf(a, key), valueOf(b, key)) * (down ? -1 : 1));
      return [...known, ...rest];
    }

    function filtered({ find: text, only }) {
      const words = text.toLowerCase().split(/\s+/);
      return rows.filter((row) => (!only || (only === "any" ? row.stands_out : row.rises && standsOut(row, only)))
        && words.every((word) => `${row.id} ${row.text} ${row.answer ?? ""} ${row.stands_out ? row.trait : ""}`.toLowerCase().includes(word)));
    }

    function header(key, label, title, state) {
      const down = state.sort === `-${key}`, up = state.sort === key || (!state.sort && key === "prompt"), numeric = !["prompt", "top", "answer"].includes(key);
      const next = numeric ? (down ? key : `-${key}`) : up ? `-${key}` : key;
      return element("th", { scope: "col", className: COLUMNS[key] ? key : "of-trait", "aria-sort": down ? "descending" : up ? "ascending" : "none" },
        element("button", { title: `${title} Sort.`, onclick: () => tl.state.set({ sort: next }, { quietly: true }) }, label, element("span", { "aria-hidden": "true" }, down ? " \u2193" : up ? " \u2191" : "")));
    }

    function cellsOf(row, traits, most) {
      const samples = row.n_samples ? element("small", {}, ` ${row.n_samples} sample${row.n_samples > 1 ? "s" : ""}`) : null;
      const cells = [element("th", { scope: "row", className: "prompt" }, element("button", { className: "open", dir: "auto", onclick: () => open(row) }, element("b", {}, row.id), " ", tl.visible(row.text)), samples, row.notes ? element("small", { className: "noted" }, ` ${row.notes} note${row.notes > 1 ? "s" : ""}`) : null)];
      if (found?.traits.length) {
        const top = !row.trait ? "not projected" : row.stands_out ? row.trait : row.chance === null ? `${row.trait} (chance unknown)` : "none";
        cells.push(element("td", { className: row.stands_out ? "top out" : "top" }, top), element("td", { className: "number" }, tl.rise(row.rise)), element("td", { className: "number" }, row.chance === undefined ? "" : row.chance === null ? "?" : tl.rise(row.chance)));
      }
      cells.push(element("td", { className: "answer", dir: "auto", title: row.answer ?? "" }, tl.visible(row.answer ?? "\u2026")));
      for (const trait of traits) {
        const value = row.rises?.[trait], out = row.rises && standsOut(row, trait);
        cells.push(element("td", { className: out ? "number cell out" : "number cell", style: { backgroundColor: colours.diverging(value, most * 1.7) }, title: value === undefined ? `${trait}: not projected` : `${trait} rose by ${tl.rise(value)} standard deviations, ${isUnknown(row, trait) ? "chance unknown" : out ? "more than chance" : "within chance"}`, onclick: () => value !== undefined && open(row, trait) }, tl.rise(value)));
      }
      return cells;
    }

    /** Draw rows of the list until there are `count`. */
    function drawRows(count) {
      const state = tl.state.now, traits = found?.traits ?? [], drawn = drawnRows();
      const most = rows.reduce((reach, { rises }) => Object.values(rises ?? {}).reduce((largest, rise) => Math.max(largest, Math.abs(rise)), reach), 1e-9);
      body.querySelector(".more")?.remove();
      body.append(...listed.slice(drawn, count).map((row) => element("tr", { className: row.captures.includes(state.prompt) ? "chosen" : "", onclick: (event) => { if (!event.target.closest("button, .cell")) open(row); } }, cellsOf(row, traits, most))));
      if (count < listed.length) body.append(element("tr", { className: "more" }, element("td", { className: "note", colSpan: 5 + traits.length }, `the first ${count} of ${listed.length} prompts; `, element("button", { onclick: drawMore }, `show ${STEP} more`))));
    }

    const drawnRows = () => body?.querySelectorAll("tr:not(.more)").length ?? 0;

    const drawMore = () => drawRows(drawnRows() + STEP);

    function draw(state) {
      const focused = document.activeElement === find, traits = found?.traits ?? [], before = order === orderOf(state) ? drawnRows() : 0;
      listed = sorted(filtered(state), state);
      order = orderOf(state);
      const columns = traits.length ? ["prompt", "top", "rise", "chance", "answer"] : ["prompt", "answer"];
      first = listed[0] ?? null;
      const head = [...columns.map((key) => header(key, COLUMNS[key][0], COLUMNS[key][1], state)), ...traits.map((trait) => header(trait, trait.split("/").pop(), `Rise of ${trait}.`, state))];
      body = element("tbody", {});
      drawRows(Math.max(STEP, before));
      if (!listed.length) body.append(element("tr", {}, element("td", { className: "note", colSpan: head.length }, "no match")));
      table.replaceChildren(element("table", { className: "overview" }, element("thead", {}, element("tr", {}, head)), body));
      const outstanding = rows.filter((row) => row.stands_out).length, measured = rows.filter((row) => typeof row.chance === "number").length;
      const expected = measured > 1 ? `, by chance in ${tl.number(0.05 * measured, 2)}` : "";
      controls.replaceChildren(find, ...(traits.length ? [tl.choice("show", [["", "all prompts"], ["any", "where any trait stands out"], ...traits.map((trait) => [trait, `where ${trait} stands out`])], state.only, (only) => tl.state.set({ only }, { quietly: true }))] : []),
        element("span", { className: "note", role: "status" }, `${listed.length} of ${rows.length} prompts${traits.length ? `; in ${outstanding} a trait stands out${expected}` : ""}`));
      if (find.value !== state.find) find.value = state.find;
      if (focused) find.focus();
    }

    function tell() {
      const score = found.against.startsWith("its own") ? `in standard deviations of ${found.against.replace("its own ", "its ")}` : `as a standard score against ${found.against}: at 0, a trait rises as much as it does there on average`;
      const text = found.traits.length ? `Rise: the mean projection over the response less that over the prompt, ${score}. A trait stands out, in bold, if its rise exceeds the chance level of its prompt: what the largest of as many rises stays below in 95 % of random directions and of ordinary prompts.` : null;
      notes.replaceChildren(...(text ? [tl.note(text)] : []), ...(found.missing ? [tl.emptyState(new tl.source.Missing(found.missing))] : []), ...(found.doubts ?? []).map((doubt) => tl.note(doubt)), ...[...found.problems, ...found.unread].map((problem) => tl.warning(problem)));
    }

    const orderOf = ({ experiment, set, sort, find: text, only }) => JSON.stringify([experiment, set, sort, text, only]);

    /** The rows of the list with what is known of them. */
    function merge() {
      const known = new Map((found?.rows ?? []).map((row) => [row.captures[0], row]));
      rows = groups.map((group) => ({ ...known.get(group.captures[0]), ...group }));
    }

    /** Read what stands out, once at a time, until what was asked for last has been read. */
    async function read() {
      while (asked && !isGone) {
        const { experiment, set, component } = asked;
        asked = null;
        const result = await tl.source.overview(experiment, set, component);
        if (asked || isGone || result === found) continue;
        found = result;
        merge();
        draw(tl.state.now);
        tell();
      }
    }

    return {
      /** Show the list of prompts, and what stands out in them when that is known, which takes long in a very large set. */
      async update(state) {
        const { prompts } = await tl.source.promptSet(state.experiment, state.set), shown = JSON.stringify([state.experiment, state.set, state.component]);
        groups = tl.byPrompt(prompts).map((group) => ({ id: group.id, text: group.text, n_samples: group.samples.length, notes: group.captures.reduce((sum, each) => sum + (each.notes ?? 0), 0), captures: group.captures.map((each) => each.id) }));
        if (of !== shown) found = null;
        of = shown;
        merge();
        draw(state);
        asked = state;
        reading ??= read().finally(() => { reading = null; });
        const mine = reading, isLate = await Promise.race([mine.then(() => false), new Promise((resolve) => setTimeout(resolve, prompts.length < LARGE ? PATIENCE : 0, true))]);
        if (!isLate) return;
        if (!found) notes.replaceChildren(element("p", { className: "note", role: "status" }, `Reading what stands out in ${prompts.length} captures \u2026`));
        mine.catch((error) => { if (!isGone) notes.replaceChildren(tl.emptyState(error)); });
      },
      remove() { isGone = true; },
    };
  },
};

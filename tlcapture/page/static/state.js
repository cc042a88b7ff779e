"use strict";
// What the page shows. The state is stored in the address, so that a view can be shared; all else derives from it.
window.tl = {};

tl.state = (() => {
  const DEFAULTS = {
    view: "", experiment: "", set: "", prompt: "", trait: "", component: "residual",
    token: null, layer: null, head: 0, point: "residual_out", measure: "entropy", mode: "", mean: true, fold: false, window: "", hook: "", added: "norm", by: "probability", shown: "", normalise: false, calibrated: true, spread: true, response: false,
    average: false, experiment2: "", set2: "", prompt2: "", average2: false, other: "", quantity: "trait", theme: "",
    sort: "", find: "", only: "", from: "",
    provisional: false, // whether the trait stands in for one that is not known yet; the address has neither
  };
  // Changes of these keys add no entry to the browser's history.
  const PASSING = new Set(["token", "layer", "head"]);
  const listeners = [];
  let now = fromAddress();

  function fromAddress() {
    const found = { ...DEFAULTS };
    for (const [key, text] of new URLSearchParams(location.hash.slice(1))) {
      if (!(key in DEFAULTS) || key === "provisional") continue;
      const fallback = DEFAULTS[key];
      if (typeof fallback === "boolean") found[key] = text === "1";
      else if (fallback === null || typeof fallback === "number") found[key] = /^\d{1,9}$/.test(text) ? Number(text) : fallback;
      else found[key] = text;
    }
    return found;
  }

  function address() {
    const pairs = Object.entries(now).filter(([key, value]) => value !== DEFAULTS[key] && key !== "provisional" && !(key === "trait" && now.provisional));
    return "#" + new URLSearchParams(pairs.map(([key, value]) => [key, value === true ? "1" : String(value)]));
  }

  function tell(changed) {
    for (const listener of listeners) listener(now, changed);
  }

  addEventListener("popstate", () => {
    const before = now;
    now = fromAddress();
    tell(new Set(Object.keys(DEFAULTS).filter((key) => now[key] !== before[key])));
  });

  return {
    get now() { return now; },
    onChange(listener) { listeners.push(listener); },
    /** Change parts of the state and notify the listeners. `quietly` adds no entry to the browser's history. */
    set(changes, { quietly = false } = {}) {
      const next = { ...now, ...changes, provisional: changes.provisional ?? (now.provisional && !("trait" in changes)) };
      const changed = new Set(Object.keys(next).filter((key) => next[key] !== now[key]));
      if (!changed.size) return;
      now = next;
      const passing = quietly || [...changed].every((key) => PASSING.has(key));
      history[passing ? "replaceState" : "pushState"](null, "", address());
      tell(changed);
    },
  };
})();

"use strict";
// Attention in three ways: of the chosen token, of all tokens by all tokens, and of every head on average.
tl.attention = {};

tl.views.attention = {
  title: "Attention",
  create(container) {
    const { element } = tl;
    const WAYS = { token: "one token", matrix: "all tokens", heads: "all heads" };
    const tabs = element("div", { className: "ways", role: "group", "aria-label": "What to show of the attention" }), box = element("div");
    container.append(tabs, box);
    let shown = null, part = null;

    return {
      async update(state, changed, data) {
        const way = WAYS[state.mode] ? state.mode : "token";
        tabs.replaceChildren(...Object.entries(WAYS).map(([key, text]) => tl.toggle(text, key === way, () => tl.state.set({ mode: key }))));
        if (shown !== way) {
          part?.remove();
          box.replaceChildren();
          part = tl.attention[way].create(box);
          shown = way;
          changed = new Set([...changed, "view"]);
        }
        await part.update(state, changed, data);
      },
      remove: () => part?.remove(),
    };
  },
};

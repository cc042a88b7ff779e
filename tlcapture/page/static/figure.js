"use strict";
// A Plotly figure in the colours of the page, with buttons to save it as PNG or SVG.
let loading = null;

/** A promise of Plotly, which is loaded when it is first asked for: its script is large, and the overview has no figure. */
tl.plotly = () => (loading ??= new Promise((resolve, reject) => {
  if (window.Plotly) return resolve(window.Plotly);
  const script = tl.element("script", { src: "plotly.js", onload: () => resolve(window.Plotly), onerror: () => reject(new Error("Plotly's script could not be loaded")) });
  document.head.append(script);
}));

tl.figure = ({ name, height = 300, onClick }) => {
  const { element } = tl;
  const plot = element("div", { className: "plot", style: { height: `${height}px` } });
  const save = (format) => tl.plotly().then((Plotly) => Plotly.downloadImage(plot, {
    format, filename: `tlcapture_${[name, tl.state.now.set, tl.state.now.prompt].filter(Boolean).join("_")}`,
    width: plot.clientWidth, height: plot.clientHeight, scale: format === "png" ? 2 : 1,
  }));
  const whole = element("div", { className: "figure" },
    element("div", { className: "save" }, ["png", "svg"].map((format) => element("button", { title: `Save this figure as ${format.toUpperCase()}`, onclick: () => save(format) }, format.toUpperCase()))),
    plot);
  let drawn = Promise.resolve(), listening = false;

  /** The range of an axis of tokens where only the response is shown. */
  function rangeOf({ title }) {
    if (!tl.figure.tokens || !title?.startsWith("token")) return {};
    const [first, stop] = tl.figure.tokens, isRelative = title.includes("relative");
    return { range: isRelative ? [-0.5, stop - first - 0.5] : [first - 0.5, stop - 0.5] };
  }

  /** A title in as many lines as it needs. */
  function titled({ title, margin, legend }) {
    if (!title) return {};
    const most = Math.max(20, Math.floor(((plot.clientWidth || 900) - 20) / 6.6)), lines = [""];
    for (const word of title.split(" ")) {
      if (lines.at(-1) && lines.at(-1).length + word.length >= most) lines.push(word);
      else lines[lines.length - 1] = `${lines.at(-1)} ${word}`.trim();
    }
    const below = legend?.y > 1 ? { legend: { orientation: "h", y: -0.38, yanchor: "top" } } : {}; // where the title needs its room
    const whole = { title: { text: lines.join("<br>"), font: { size: 13 } } };
    return lines.length < 2 ? whole : { ...whole, margin: { l: 54, r: 14, b: below.legend ? 76 : 38, ...margin, t: 30 + 17 * (lines.length - 1) }, ...below };
  }

  function styled(layout) {
    const { css } = tl.colours;
    const axis = { gridcolor: css("--line"), zerolinecolor: css("--line"), linecolor: css("--line"), automargin: true };
    const axes = { xaxis: {}, yaxis: {}, ...Object.fromEntries(Object.entries(layout).filter(([key]) => /^[xy]axis/.test(key))) };
    for (const [key, own] of Object.entries(axes)) axes[key] = { ...axis, ...own, title: { text: own.title }, ...(key.startsWith("x") ? rangeOf(own) : {}) };
    return {
      paper_bgcolor: css("--panel"), plot_bgcolor: css("--panel"),
      font: { color: css("--text"), size: 12, family: "system-ui, sans-serif" },
      margin: { l: 54, r: 14, t: 30, b: 38 }, hovermode: "closest", showlegend: false,
      ...layout, ...titled(layout), ...axes,
    };
  }

  return {
    element: whole,
    plot,
    /** Draw after previous draws have finished; titles in the layout are plain texts. Returns a promise. */
    draw(traces, layout) {
      plot.dataset.drawn = "no";
      drawn = drawn.then(tl.plotly).then(async (Plotly) => {
        if (plot.dataset.gone) return;
        await Plotly.react(plot, traces, styled(layout), { displaylogo: false, responsive: true, displayModeBar: false });
        plot.dataset.drawn = "yes";
        if (onClick && !listening) {
          listening = true;
          plot.on("plotly_click", (event) => onClick(event.points[0]));
        }
      });
      return drawn;
    },
    /** Update only the shapes, to move a marker. */
    mark(shapes) {
      drawn = drawn.then(tl.plotly).then((Plotly) => (plot.dataset.gone || !plot.layout ? null : Plotly.relayout(plot, { shapes })));
      return drawn;
    },
    remove() {
      plot.dataset.gone = "yes";
      if (window.Plotly) window.Plotly.purge(plot);
    },
  };
};

/** A vertical line at a token. */
tl.lineAt = (x, colour, dash = "solid", width = 1.5) => ({
  type: "line", xref: "x", yref: "paper", x0: x, x1: x, y0: 0, y1: 1, line: { color: colour, dash, width },
});

/** A horizontal line at a value, such as a layer. */
tl.levelAt = (y, colour, dash = "solid", width = 1) => ({
  type: "line", xref: "paper", yref: "y", x0: 0, x1: 1, y0: y, y1: y, line: { color: colour, dash, width },
});

/** The band between two lines over the same places. */
tl.band = (x, low, high, colour, name) => ({
  x: [...x, ...[...x].reverse()], y: [...high, ...[...low].reverse()],
  fill: "toself", fillcolor: colour, opacity: 0.16, line: { width: 0 }, mode: "lines", hoverinfo: "skip", name,
});

/** Tokens with their indices, as a figure names them. */
tl.numbered = (tokens) => tokens.map((token, index) => `${index} ${tl.plain(tl.quoted(token))}`);

/** Text for a figure, escaped because Plotly parses some HTML. */
tl.plain = (text) => tl.visible(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

"use strict";
// All tokens by all tokens: the weights of one head, or of the mean over a layer's heads, drawn on a canvas.
tl.attention.matrix = {
  create(container) {
    const { element, colours } = tl;
    const MOST = 760, LABELS = 92, BAND = 7, LINE = 12; // pixels: of the drawing, of its labels, of spans, of a line of text
    const controls = element("div", { className: "controls" });
    const canvas = element("canvas", { tabIndex: 0, role: "application", "aria-label": "Attention matrix: queries down, keys across. The arrow keys move, Enter chooses the query.", "aria-describedby": "cell" });
    const over = element("canvas", { className: "over", "aria-hidden": "true" });
    const cell = element("p", { id: "cell", className: "note", "aria-live": "polite" }, "\u00a0"), notes = element("p", { className: "note" });
    container.append(controls, element("div", { className: "matrix" }, canvas, over), cell, notes);
    let drawn = null, at = null;

    /** The token or folded span that each row or column is of, from `first` on. */
    function groupsOf(data, { fold, first }) {
      const names = tl.spanNames(data.tokens.length, data.spans), groups = [];
      for (let token = first; token < data.tokens.length; token += 1) {
        const last = groups.at(-1), name = names[token] ?? "prompt";
        const joins = fold && token < data.n_prompt_tokens && token > 1 && last?.name === name;
        if (joins) last.stop = token + 1;
        else groups.push({ start: token, stop: token + 1, name });
      }
      return groups.map((group) => {
        const n = group.stop - group.start;
        return n > 1 ? { ...group, label: `${group.name}, ${n} tokens`, axis: `${group.name} (${n})` } : { ...group, label: data.labels[group.start], axis: data.labels[group.start] };
      });
    }

    /** The rows and columns that are shown, around the chosen token where not all are. */
    function axesOf(state, data, queries) {
      const fold = state.fold && !state.response, first = state.response ? data.n_prompt_tokens : 0;
      let keys = groupsOf(data, { fold, first });
      const kept = new Set(queries);
      let rows = groupsOf(data, { fold: false, first: fold ? data.n_prompt_tokens : first }).filter((row) => kept.has(row.start));
      const width = Number(state.window) || 0;
      if (width && rows.length > width) {
        const middle = Math.max(0, rows.findIndex((row) => row.start >= (state.token ?? data.n_prompt_tokens)));
        const start = Math.max(0, Math.min(rows.length - width, middle - Math.floor(width / 2)));
        rows = rows.slice(start, start + width);
        keys = keys.filter((key) => key.start <= rows.at(-1).start).slice(-width);
      }
      return { rows, keys };
    }

    /** The weight of every cell: what a query puts on the tokens of a key; NaN for keys after it. */
    function cellsOf({ queries, weights }, { rows, keys }) {
      const starts = new Map();
      let start = 0;
      for (const query of queries) {
        starts.set(query, start);
        start += query + 1;
      }
      const cells = new Float32Array(rows.length * keys.length).fill(NaN);
      rows.forEach((row, y) => {
        const base = starts.get(row.start);
        for (let x = 0; x < keys.length && keys[x].start <= row.start; x += 1) {
          let sum = 0;
          for (let token = keys[x].start; token < Math.min(keys[x].stop, row.start + 1); token += 1) sum += weights[base + token];
          cells[y * keys.length + x] = sum;
        }
      });
      return cells;
    }

    /** Where the scale ends: the 99.5th percentile without the first token, an attention sink, from at most 40,000 cells. */
    function endOf(cells, keys) {
      const step = Math.max(1, Math.floor(cells.length / 40000)), sizes = [];
      for (let index = 0; index < cells.length; index += step) if (keys[index % keys.length].start > 0 && !Number.isNaN(cells[index])) sizes.push(cells[index]);
      sizes.sort((a, b) => a - b);
      return Math.max(0.02, sizes[Math.floor(0.995 * (sizes.length - 1))] ?? 0);
    }

    /** A picture of the cells, of a pixel each, or of several in one pixel, which shows the largest of them. */
    function pictureOf(cells, nRows, nKeys, width, height, most) {
      const found = new Float32Array(width * height).fill(NaN);
      for (let y = 0; y < nRows; y += 1) {
        const line = Math.floor((y * height) / nRows) * width;
        for (let x = 0; x < nKeys; x += 1) {
          const value = cells[y * nKeys + x], pixel = line + Math.floor((x * width) / nKeys);
          if (!(found[pixel] >= value) && !Number.isNaN(value)) found[pixel] = value;
        }
      }
      const image = new ImageData(width, height), ramp = colours.ramp(), blank = colours.numbers("--back");
      found.forEach((value, index) => {
        const colour = Number.isNaN(value) ? blank : ramp[Math.round(255 * Math.min(1, value / most))];
        for (let part = 0; part < 3; part += 1) image.data[index * 4 + part] = colour[part];
        image.data[index * 4 + 3] = 255;
      });
      return image;
    }

    function sized(each, width, height) {
      const ratio = devicePixelRatio || 1, context = each.getContext("2d");
      each.width = width * ratio;
      each.height = height * ratio;
      Object.assign(each.style, { width: `${width}px`, height: `${height}px` });
      context.setTransform(ratio, 0, 0, ratio, 0, 0);
      return context;
    }

    const short = (text) => (text.length > 13 ? `${text.slice(0, 12)}\u2026` : text);

    /** Labels of every row or column, or of as many as have room, and the spans that they belong to. */
    function drawAxis(context, groups, size, isRow) {
      const step = Math.ceil((LINE * groups.length) / size);
      context.font = "10.5px ui-monospace, monospace";
      context.textBaseline = "middle";
      groups.forEach((group, index) => {
        const from = (index * size) / groups.length, length = size / groups.length;
        const band = colours.span(group.name);
        if (band) {
          context.fillStyle = band;
          if (isRow) context.fillRect(LABELS, LABELS + BAND + from, BAND, Math.max(1, length));
          else context.fillRect(LABELS + BAND + from, LABELS, Math.max(1, length), BAND);
        }
        if (index % step) return;
        context.save();
        context.fillStyle = colours.css("--text");
        if (isRow) context.translate(LABELS - 4, LABELS + BAND + from + length / 2);
        else {
          context.translate(LABELS + BAND + from + length / 2, LABELS - 4);
          context.rotate(-Math.PI / 2);
        }
        context.textAlign = isRow ? "right" : "left";
        context.fillText(short(tl.visible(group.axis)), 0, 0, LABELS - 8);
        context.restore();
      });
    }

    function draw({ cells, rows, keys, most }) {
      const room = Math.max(160, Math.min(MOST, container.clientWidth - LABELS - BAND - 2));
      const side = (n, other) => (n >= room ? room : Math.min(room, n * Math.max(1, Math.min(18, Math.floor(room / Math.max(n, other))))));
      const width = side(keys.length, rows.length), height = side(rows.length, keys.length);
      const context = sized(canvas, width + LABELS + BAND + 1, height + LABELS + BAND + 1);
      const picture = pictureOf(cells, rows.length, keys.length, Math.min(keys.length, width), Math.min(rows.length, height), most);
      const small = element("canvas", { width: picture.width, height: picture.height });
      small.getContext("2d").putImageData(picture, 0, 0);
      context.fillStyle = colours.css("--panel");
      context.fillRect(0, 0, canvas.width, canvas.height);
      context.imageSmoothingEnabled = false;
      context.drawImage(small, LABELS + BAND, LABELS + BAND, width, height);
      drawAxis(context, rows, height, true);
      drawAxis(context, keys, width, false);
      context.fillStyle = colours.css("--faint");
      context.textAlign = "left";
      context.textBaseline = "alphabetic";
      context.fillText("query \u2193  key \u2192", 2, LABELS - 2, LABELS - 4);
      return { width, height };
    }

    /** Lines at the cell under the mouse or the keyboard, and at the chosen token. */
    function point() {
      const { rows, keys, width, height } = drawn, context = sized(over, width + LABELS + BAND + 1, height + LABELS + BAND + 1);
      context.clearRect(0, 0, over.width, over.height);
      context.strokeStyle = colours.css("--accent");
      const frame = (x, y, w, h) => context.strokeRect(LABELS + BAND + x, LABELS + BAND + y, w, h);
      const tall = height / rows.length, wide = width / keys.length, chosen = rows.findIndex((row) => row.start === tl.state.now.token);
      if (chosen > -1) frame(0, chosen * tall, width, Math.max(1.5, tall));
      if (!at) return;
      context.lineWidth = 2;
      frame(at.x * wide, at.y * tall, Math.max(3, wide), Math.max(3, tall));
      const row = rows[at.y], key = keys[at.x], value = drawn.cells[at.y * keys.length + at.x];
      cell.replaceChildren("query ", element("b", {}, `${row.start} ${tl.quoted(row.label)}`), " on ", element("b", {}, `${key.start} ${tl.quoted(key.label)}`), Number.isNaN(value) ? ": a later token, which it cannot see" : `: ${tl.number(value, 3)}`);
    }

    function placeOf(event) {
      const box = canvas.getBoundingClientRect(), { rows, keys, width, height } = drawn;
      const x = Math.floor(((event.clientX - box.left - LABELS - BAND) / width) * keys.length), y = Math.floor(((event.clientY - box.top - LABELS - BAND) / height) * rows.length);
      return x >= 0 && y >= 0 && x < keys.length && y < rows.length ? { x, y } : null;
    }

    canvas.addEventListener("mousemove", (event) => {
      if (!drawn || !placeOf(event)) return;
      at = placeOf(event);
      point();
    });
    canvas.addEventListener("click", (event) => {
      if (drawn && placeOf(event)) tl.state.set({ token: drawn.rows[placeOf(event).y].start });
    });
    canvas.addEventListener("keydown", (event) => {
      const [x, y] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key] ?? [0, 0];
      if (!drawn || (!x && !y && event.key !== "Enter")) return;
      event.preventDefault();
      event.stopPropagation();
      const { rows, keys } = drawn;
      if (event.key === "Enter") return at && tl.state.set({ token: rows[at.y].start });
      const start = at ?? { x: 0, y: Math.max(0, rows.findIndex((row) => row.start === tl.state.now.token)) };
      at = { x: Math.max(0, Math.min(keys.length - 1, start.x + x)), y: Math.max(0, Math.min(rows.length - 1, start.y + y)) };
      point();
    });

    function save() {
      const { set, prompt } = tl.state.now;
      canvas.toBlob((blob) => {
        const address = URL.createObjectURL(blob);
        element("a", { href: address, download: `tlcapture_attention_matrix_${set.replaceAll("/", "_")}_${prompt}.png` }).click();
        setTimeout(() => URL.revokeObjectURL(address), 10000);
      });
    }

    function drawControls(state, data, present, layer, nHeads, head) {
      const heads = [["mean", "mean of all"], ...Array.from({ length: nHeads }, (_, index) => [String(index), String(index)])];
      const number = (value) => [String(value), `${value} tokens around the chosen one`];
      controls.replaceChildren(
        tl.choice("layer", present.map((index) => [String(index), String(index)]), String(layer), (value) => tl.state.set({ layer: Number(value) })),
        tl.choice("head", heads, head, (value) => tl.state.set(value === "mean" ? { mean: true } : { head: Number(value), mean: false })),
        tl.choice("tokens", [["", "all"], number(120), number(40)], state.window, (value) => tl.state.set({ window: value })),
        ...(data.n_prompt_tokens > 1 && data.n_prompt_tokens < data.tokens.length && !state.response ? [tl.toggle("fold the prompt", state.fold, (fold) => tl.state.set({ fold }))] : []),
        element("button", { title: "Save this matrix as PNG", onclick: save }, "PNG"));
    }

    return {
      async update(state, changed, data) {
        const head = await tl.source.attention(state), nHeads = head.n_heads;
        const present = head.present_layers;
        if (!present.length) throw new tl.source.Missing({ what: "the file has no attention of any layer" });
        const layer = present.findLast((each) => each <= (state.layer ?? head.n_layers - 1)) ?? present[0];
        const which = state.mean ? "mean" : String(Math.min(state.head, nHeads - 1));
        const found = await tl.source.attentionMatrix(state, layer, which);
        drawControls(state, data, present, layer, nHeads, which);
        if (!found.queries.length) throw new tl.source.Missing({ what: "no token's attention was kept" });
        const name = `layer ${layer}, ${which === "mean" ? "mean of its heads" : `head ${which}`}`;
        paint(state, data, found, name);
        const axes = axesOf(state, data, found.queries);
        if (!axes.rows.length) throw new tl.source.Missing({ what: "no query to show: the attention of the response was not kept" });
        const cells = cellsOf(found, axes), most = endOf(cells, axes.keys);
        at = null;
        cell.textContent = "\u00a0";
        drawn = { ...axes, cells, most };
        Object.assign(drawn, draw(drawn));
        const shared = Math.max(axes.keys.length / drawn.width, axes.rows.length / drawn.height);
        notes.replaceChildren(colours.scale("amount", 0, most), ` weight, ${name}; full colour from ${tl.number(most, 3)} on. Rows are queries, columns the keys that they attend to${data.spans?.length ? "; bars beside them have the colours of turns, thinking and answer in the text" : ""}.`,
          shared > 1 ? ` A pixel shows the largest of ${Math.ceil(shared)} by ${Math.ceil(shared)} weights.` : "", head.kept ? ` Of this capture, ${head.kept}.` : "", head.kept_layers ? ` Kept: layers ${head.kept_layers.join(", ")}.` : "");
        point();
      },
      remove() { drawn = null; },
    };

    /** Colour the text by the weights of the chosen query. */
    function paint(state, data, { queries, weights }, name) {
      const token = state.token !== null && queries.includes(state.token) ? state.token : queries.find((query) => query >= data.n_prompt_tokens) ?? queries.at(-1);
      const start = queries.slice(0, queries.indexOf(token)).reduce((sum, query) => sum + query + 1, 0);
      const own = Array.from(weights.subarray(start, start + token + 1)), most = own.slice(1).reduce((largest, weight) => Math.max(largest, weight), 0.02);
      tl.reading.paint((index) => colours.amount(own[index] ?? null, most), (index) => (index <= token ? tl.number(own[index], 3) : "later token"), `attention of token ${token}, ${name}`, colours.scale("amount", 0, most));
    }
  },
};

"use strict";
// The text of a capture, token by token, in the colours of the view, and what each token is.

/** What each token is: the role of its turn, or thinking, answer or template; null where that is not known. */
tl.spanNames = (nTokens, spans) => {
  const names = Array(nTokens).fill(null);
  for (const { kind, role, start, stop } of spans ?? []) if (start !== null) names.fill(kind === "turn" ? role : kind, start, stop);
  return names;
};

// Tokens that are bytes of one character are one piece.
tl.strip = (container, choose) => {
  const { element } = tl;
  const FOLDED = 60, SHOWN = 16; // tokens of a prompt from which it is folded, and of its end that stay in view
  let pieces = [], names = [], fold = null;
  const tokenOf = (event) => event.target.closest(".token");
  container.addEventListener("click", (event) => {
    const token = tokenOf(event);
    if (token) choose(Number(token.dataset.token), event.shiftKey);
  });
  container.addEventListener("keydown", (event) => {
    if (!tokenOf(event) || (event.key !== "Enter" && event.key !== " ")) return;
    choose(Number(tokenOf(event).dataset.token), event.shiftKey);
    event.preventDefault();
  });

  /** The tokens as pieces of text, by the first token of each. */
  function piecesOf(tokens, joined) {
    const groups = new Map((joined ?? []).map((group) => [group.start, group])), found = [];
    for (let at = 0; at < tokens.length; at = found.at(-1).stop) found.push(groups.get(at) ?? { start: at, stop: at + 1, text: tokens[at] });
    return found;
  }

  function made({ start, stop, text }, nPrompt) {
    const kind = names[start] ? ` of-${names[start]}` : "";
    return element("span", { className: `${start < nPrompt ? "token prompt" : "token"}${kind}`, "data-token": String(start), "data-stop": stop > start + 1 ? String(stop) : null, tabIndex: -1 }, tl.visible(text), text.includes("\n") ? "\n" : null);
  }

  function reachable(piece) {
    container.querySelector(".token[tabindex='0']")?.setAttribute("tabindex", "-1");
    piece?.span.setAttribute("tabindex", "0");
  }

  function unfold() {
    fold?.hidden.forEach((span) => { span.hidden = false; });
    fold?.button.remove();
    fold = null;
  }

  /** Hide the beginning of a long prompt behind a button, so that the response is in view. */
  function folded(nPrompt) {
    const hidden = pieces.filter((piece) => piece.stop <= nPrompt - SHOWN).map((piece) => piece.span);
    if (nPrompt < FOLDED || !hidden.length) return [];
    hidden.forEach((span) => { span.hidden = true; });
    const button = element("button", { className: "fold", "aria-expanded": "false", onclick: unfold }, `\u2026 ${nPrompt - SHOWN} tokens of the prompt`);
    fold = { hidden, button };
    return [button];
  }

  return {
    /** Show tokens, underlined by what they are where that is known; the response starts at index `nPrompt`. */
    show(tokens, nPrompt, known, joined) {
      names = tl.spanNames(tokens.length, known);
      fold = null;
      pieces = piecesOf(tokens, joined).map((piece) => ({ ...piece, span: made(piece, nPrompt) }));
      const children = pieces.map((piece) => piece.span);
      const first = pieces.findIndex((piece) => piece.start >= nPrompt);
      if (first > -1) children.splice(first, 0, element("span", { className: "boundary" }, "response"));
      const kinds = [...new Set(names)].filter(Boolean);
      if (kinds.length) children.push(element("div", { className: "legend" }, kinds.map((name) => element("span", { className: `of-${name}` }, name))));
      container.replaceChildren(...folded(nPrompt), ...children);
      container.className = "strip";
      reachable(pieces[Math.max(0, first)]);
      const response = container.querySelector(".boundary");
      if (response) container.scrollTop = Math.max(0, response.offsetTop - container.offsetTop - container.clientHeight / 2);
    },
    /** Colour each token; `colourOf(index)` is a CSS colour, `textOf(index)` the tooltip. A piece has the colours of its tokens. */
    paint(colourOf, textOf = () => "") {
      for (const { start, stop, span } of pieces) {
        const indices = Array.from({ length: stop - start }, (_, number) => start + number), share = 100 / indices.length;
        const stops = indices.map((index, number) => `${colourOf(index) || "transparent"} ${number * share}% ${(number + 1) * share}%`);
        span.style.backgroundColor = indices.length > 1 ? "" : colourOf(start);
        span.style.backgroundImage = indices.length > 1 ? `linear-gradient(to right, ${stops.join(", ")})` : "";
        span.title = indices.map((index) => `${index} ${names[index] ? `${names[index]} ` : ""}${textOf(index)}`).join("\n");
      }
    },
    /** Mark the tokens that have notes, given as texts by token. */
    note(texts) {
      for (const { start, stop, span } of pieces) {
        const own = Array.from({ length: stop - start }, (_, number) => texts.get(start + number)).find((text) => text !== undefined);
        span.classList.toggle("noted", own !== undefined);
        if (own === undefined) span.removeAttribute("aria-description");
        else span.setAttribute("aria-description", `note: ${own}`);
      }
    },
    choose(index) {
      container.querySelector(".chosen")?.classList.remove("chosen");
      const piece = pieces.find((each) => index >= each.start && index < each.stop);
      if (!piece) return;
      if (piece.span.hidden) unfold();
      piece.span.classList.add("chosen");
      reachable(piece);
      if (container.contains(document.activeElement) && document.activeElement.matches(".token")) piece.span.focus({ preventScroll: true });
      const { offsetTop, offsetHeight } = piece.span;
      const top = offsetTop - container.offsetTop;
      if (top < container.scrollTop || top + offsetHeight > container.scrollTop + container.clientHeight) container.scrollTop = top - container.clientHeight / 2;
    },
  };
};

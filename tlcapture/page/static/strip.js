"use strict";
/** What each token is: the role of its turn, or thinking, answer or template; null where that is not known. */
tl.spanNames = (nTokens, spans) => {
  const names = Array(nTokens).fill(null);
  for (const { kind, role, start, stop } of spans ?? []) if (start !== null) names.fill(kind === "turn" ? role : kind, start, stop);
  return names;
};

// The text of a capture, token by token, in the colours of the view.
tl.strip = (container, choose) => {
  const { element } = tl;
  let spans = [], names = [];
  container.addEventListener("click", (event) => {
    const token = event.target.closest(".token");
    if (token) choose(Number(token.dataset.token));
  });
  return {
    /** Show tokens, underlined by what they are where that is known; the response starts at index `nPrompt`. */
    show(tokens, nPrompt, known) {
      names = tl.spanNames(tokens.length, known);
      const kindOf = (index) => (names[index] ? ` of-${names[index]}` : "");
      spans = tokens.map((token, index) => element("span", { className: `${index < nPrompt ? "token prompt" : "token"}${kindOf(index)}`, "data-token": String(index) },
        tl.visible(token), token.includes("\n") ? "\n" : null));
      const children = [...spans];
      if (nPrompt < tokens.length) children.splice(nPrompt, 0, element("span", { className: "boundary" }, "response"));
      const kinds = [...new Set(names)].filter(Boolean);
      if (kinds.length) children.push(element("div", { className: "legend" }, kinds.map((name) => element("span", { className: `of-${name}` }, name))));
      container.replaceChildren(...children);
      container.className = "strip";
    },
    /** Colour each token; `colourOf(index)` is a CSS colour, `textOf(index)` the tooltip. */
    paint(colourOf, textOf = () => "") {
      spans.forEach((span, index) => {
        span.style.backgroundColor = colourOf(index);
        span.title = `${index} ${names[index] ? `${names[index]} ` : ""}${textOf(index)}`;
      });
    },
    choose(index) {
      container.querySelector(".chosen")?.classList.remove("chosen");
      if (!spans[index]) return;
      spans[index].classList.add("chosen");
      const { offsetTop, offsetHeight } = spans[index];
      const top = offsetTop - container.offsetTop;
      if (top < container.scrollTop || top + offsetHeight > container.scrollTop + container.clientHeight) container.scrollTop = top - container.clientHeight / 2;
    },
  };
};

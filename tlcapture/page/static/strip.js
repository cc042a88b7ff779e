"use strict";
// The text of a capture, token by token, in the colours of the view.
tl.strip = (container, choose) => {
  const { element } = tl;
  let spans = [];
  container.addEventListener("click", (event) => {
    const token = event.target.closest(".token");
    if (token) choose(Number(token.dataset.token));
  });
  return {
    /** Show tokens; the response starts at index `nPrompt`. */
    show(tokens, nPrompt) {
      spans = tokens.map((token, index) => element("span", { className: index < nPrompt ? "token prompt" : "token", "data-token": String(index) },
        tl.visible(token), token.includes("\n") ? "\n" : null));
      const children = [...spans];
      if (nPrompt < tokens.length) children.splice(nPrompt, 0, element("span", { className: "boundary" }, "response"));
      container.replaceChildren(...children);
      container.className = "strip";
    },
    /** Colour each token; `colourOf(index)` is a CSS colour, `textOf(index)` the tooltip. */
    paint(colourOf, textOf = () => "") {
      spans.forEach((span, index) => {
        span.style.backgroundColor = colourOf(index);
        span.title = `${index} ${textOf(index)}`;
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

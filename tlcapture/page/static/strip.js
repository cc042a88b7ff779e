"use strict";
// The text of a capture, token by token, coloured by whatever the view says.
tl.strip = (container, choose) => {
  const { element } = tl;
  let spans = [];
  container.addEventListener("click", (event) => {
    const token = event.target.closest(".token");
    if (token) choose(Number(token.dataset.token));
  });
  return {
    /** Show tokens, the response beginning at `nPrompt`. */
    show(tokens, nPrompt) {
      spans = tokens.map((token, place) => element("span", { className: place < nPrompt ? "token prompt" : "token", "data-token": String(place) },
        tl.visible(token), token.includes("\n") ? "\n" : null));
      const children = [...spans];
      if (nPrompt < tokens.length) children.splice(nPrompt, 0, element("span", { className: "boundary" }, "response"));
      container.replaceChildren(...children);
      container.className = "strip";
    },
    /** Colour each token; `colourOf(place)` is a CSS colour, `textOf(place)` what hovering says. */
    paint(colourOf, textOf = () => "") {
      spans.forEach((span, place) => {
        span.style.backgroundColor = colourOf(place);
        span.title = `${place} ${textOf(place)}`;
      });
    },
    choose(place) {
      container.querySelector(".chosen")?.classList.remove("chosen");
      if (!spans[place]) return;
      spans[place].classList.add("chosen");
      const { offsetTop, offsetHeight } = spans[place];
      const top = offsetTop - container.offsetTop;
      if (top < container.scrollTop || top + offsetHeight > container.scrollTop + container.clientHeight) container.scrollTop = top - container.clientHeight / 2;
    },
  };
};

"use strict";
// Creates elements from names, properties and children. Text becomes text nodes; nothing is parsed as HTML.
tl.element = (name, properties = {}, ...children) => {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (key === "style") Object.assign(made.style, value);
    else if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (key in made && !key.startsWith("aria")) made[key] = value;
    else made.setAttribute(key, value === true ? "true" : value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return made;
};

/** A token with visible line breaks and tabs. */
tl.visible = (token) => String(token).replace(/\n/g, "\u23ce").replace(/\t/g, "\u21e5").replace(/\r/g, "\u240d");

/** A visible token in quotation marks, which show leading and trailing spaces. */
tl.quoted = (token) => `\u2018${tl.visible(token)}\u2019`;

/** A number with `digits` significant digits. */
tl.number = (value, digits = 4) => {
  if (value === null || value === undefined || !Number.isFinite(value)) return "\u2013";
  const size = Math.abs(value);
  if (size !== 0 && (size >= 1e6 || size < 1e-4)) return value.toExponential(digits - 1);
  return Number(value.toPrecision(digits)).toLocaleString("en", { maximumSignificantDigits: digits });
};

/** A paragraph that explains, and one that warns. */
tl.note = (...children) => tl.element("p", { className: "note" }, ...children);
tl.warning = (...children) => tl.element("p", { className: "warning" }, ...children);

/** The content of a view without data: what is missing, and the command that creates it. */
tl.emptyState = (error) => {
  const { element } = tl;
  if (!(error instanceof tl.source.Missing)) {
    console.error(error);
    return element("div", { className: "empty" }, `this view failed: ${error.message}`);
  }
  return element("div", { className: "empty" }, element("p", {}, error.message),
    error.command ? element("p", {}, element("code", {}, error.command)) : null);
};

/** Words of the page that need a definition. */
tl.TERMS = {
  "calibrated": "On the scale of the examples that the vector was made from: the negative ones have their mean at 0, the positive ones at 1.",
  "commitment": "The change point of the response: the token from which on the trajectory stays at another level. None is given where more than 5 % of series without a change have one as clear.",
  "persistence": "The tokens from the peak of the smoothed response on, itself counted, that stay at or above half of its rise over the prompt.",
  "velocity": "The change of the projection from one token to the next.",
  "effect_size": "Chosen because it separates held-out examples best (Hedges' g, over the layers and methods that were evaluated).",
  "steering": "Chosen because adding it to the residual stream changes the model's text most, while that stays coherent.",
  "fallback": "Chosen by a rule alone (layer 16, or at 60 % of the depth of a smaller model), because vectors have been neither evaluated nor steered.",
};

/** A word with its definition as a tooltip, which the keyboard reaches. */
tl.term = (name, text = name) => (tl.TERMS[name] ? tl.element("abbr", { title: tl.TERMS[name], tabIndex: 0 }, text) : text);

/** A labelled select element. */
tl.choice = (label, options, value, choose) => {
  const { element } = tl;
  const made = element("select", { "aria-label": label, onchange: () => choose(made.value) },
    options.map(([key, text]) => element("option", { value: key, selected: key === value }, text)));
  return element("label", {}, label, made);
};

/** A button that is on or off. */
tl.toggle = (label, on, turn) => tl.element("button", { title: tl.TERMS[label] ?? "", "aria-pressed": on ? "true" : "false", onclick: () => turn(!on) }, label);

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

/** A labelled select element. */
tl.choice = (label, options, value, choose) => {
  const { element } = tl;
  const made = element("select", { "aria-label": label, onchange: () => choose(made.value) },
    options.map(([key, text]) => element("option", { value: key, selected: key === value }, text)));
  return element("label", {}, label, made);
};

/** A button that is on or off. */
tl.toggle = (label, on, turn) => tl.element("button", { "aria-pressed": on ? "true" : "false", onclick: () => turn(!on) }, label);

"use strict";
// Colours of values and traits. They are translucent, so that they work on light and dark backgrounds.
tl.colours = (() => {
  const POSITIVE = [214, 93, 14], NEGATIVE = [38, 110, 200], AMOUNT = [126, 70, 190];
  const TRAITS = ["#d65d0e", "#2f7ed8", "#2a9d58", "#a34fb5", "#c43c50", "#1aa3a3", "#8a6d1f", "#7d7aea", "#d0569b", "#6b8e23"];

  const over = ([r, g, b], alpha) => `rgba(${r}, ${g}, ${b}, ${Math.min(1, alpha).toFixed(3)})`;
  const isNumber = (value) => value !== null && value !== undefined && Number.isFinite(value);

  /** The largest absolute value, without the first token, an attention sink that would dominate the scale. */
  function reach(values) {
    let largest = 0;
    values.slice(1).forEach((value) => { if (isNumber(value)) largest = Math.max(largest, Math.abs(value)); });
    return largest || 1;
  }

  return {
    reach,
    /** Blue below zero, orange above, saturated at `most`. */
    diverging: (value, most) => (isNumber(value) ? over(value < 0 ? NEGATIVE : POSITIVE, (0.85 * Math.abs(value)) / most) : ""),
    /** Transparent at zero, saturated at `most`. */
    amount: (value, most = 1) => (isNumber(value) ? over(AMOUNT, (0.8 * Math.max(0, value)) / most) : ""),
    trait: (traits, trait) => TRAITS[Math.max(0, traits.indexOf(trait)) % TRAITS.length],
    divergingScale: () => [[0, "rgb(38,110,200)"], [0.5, tl.colours.css("--panel")], [1, "rgb(214,93,14)"]],
    amountScale: () => [[0, tl.colours.css("--panel")], [1, "rgb(126,70,190)"]],
    /** The current value, light or dark, of a colour of the style sheet. */
    css(name) {
      const probe = document.createElement("i");
      probe.style.color = `var(${name})`;
      document.body.append(probe);
      const found = getComputedStyle(probe).color;
      probe.remove();
      return found;
    },
  };
})();

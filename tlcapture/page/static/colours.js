"use strict";
// Colours of numbers and of traits. They are laid over the background, so that they serve light and dark alike.
tl.colours = (() => {
  const POSITIVE = [214, 93, 14], NEGATIVE = [38, 110, 200], AMOUNT = [126, 70, 190];
  const TRAITS = ["#d65d0e", "#2f7ed8", "#2a9d58", "#a34fb5", "#c43c50", "#1aa3a3", "#8a6d1f", "#7d7aea", "#d0569b", "#6b8e23"];

  const over = ([r, g, b], alpha) => `rgba(${r}, ${g}, ${b}, ${Math.min(1, alpha).toFixed(3)})`;
  const isNumber = (value) => value !== null && value !== undefined && Number.isFinite(value);

  /** The largest size among numbers, the first left out: an attention sink that would bleach all others. */
  function reach(values) {
    let largest = 0;
    values.slice(1).forEach((value) => { if (isNumber(value)) largest = Math.max(largest, Math.abs(value)); });
    return largest || 1;
  }

  return {
    reach,
    /** Below zero blue, above it orange, full at `most`. */
    diverging: (value, most) => (isNumber(value) ? over(value < 0 ? NEGATIVE : POSITIVE, (0.85 * Math.abs(value)) / most) : ""),
    /** From nothing to full at `most`. */
    amount: (value, most = 1) => (isNumber(value) ? over(AMOUNT, (0.8 * Math.max(0, value)) / most) : ""),
    trait: (traits, trait) => TRAITS[Math.max(0, traits.indexOf(trait)) % TRAITS.length],
    divergingScale: () => [[0, "rgb(38,110,200)"], [0.5, tl.colours.css("--panel")], [1, "rgb(214,93,14)"]],
    amountScale: () => [[0, tl.colours.css("--panel")], [1, "rgb(126,70,190)"]],
    /** A colour of the style sheet as it is now, light or dark. */
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

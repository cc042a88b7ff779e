"use strict";
// A capture of the shown set that is at work, or was stopped: how much of it is there, and how much is not.
tl.work = (box) => {
  const { element } = tl;
  let last = "";

  function tell(set, run) {
    const rest = run.planned - run.done - run.failed, failed = run.failed ? `, ${run.failed} failed` : "";
    const counts = [element("b", {}, `${run.done} of ${run.planned}`), ` captures of ${set} are here`];
    const bar = element("progress", { max: run.planned, value: run.done, "aria-label": `captures of ${set}` });
    if (run.is_running) return [bar, " ", ...counts, `; a run is making the other ${rest}${failed}.`];
    return [bar, " ", ...counts, `; the run was stopped before the other ${rest}${failed}. Go on with `, element("code", {}, run.command)];
  }

  return {
    /** Ask the server and say what it knows; nothing changes where that is the same as before. */
    async update({ experiment, set }) {
      const run = experiment && set ? await tl.source.atWork(experiment, set).catch(() => null) : null, now = JSON.stringify([set, run]);
      if (now === last) return;
      last = now;
      box.hidden = !run;
      box.replaceChildren(...(run ? tell(set, run) : []));
    },
  };
};

// ---- details: one operation, and what is live while it runs ------------------------------------

const LISTED = 10;

function detailsOf({ step, plan, network, page }, p) {
  const [code, i] = [step.code[p], step.stage[p]];
  const runs = code === FORWARD || code === TAPED;
  const tags = element("p", { class: "tags" });
  if (p === plan.peakPosition) tags.append(element("span", { class: "tag peak" }, "peak of the step"));
  if (step.again[p]) tags.append(element("span", { class: "tag again" }, "run again"));
  if (code === TAPED) {
    tags.append(element("span", { class: "tag" }, step.kind[p] ? "keeps a lean tape" : "keeps its tape"));
  }
  const pairs = element("dl", { class: "pairs" });
  const put = (name, value) => pairs.append(element("dt", {}, name), element("dd", {}, value));
  put("bytes", bytesText(step.total[p]));
  if (step.measured) put("measured", measuredText(step, p));
  put("of the budget", percentText(step.total[p] / Math.max(plan.budgetBytes, 1)));
  put("of its own", bytesText(step.transient[p]));
  if (code <= BACKWARD) put("seconds", secondsText(step.seconds[p]));
  if (i > 0 || code === DROP) put("module", stateName(network, i));
  const layout = i > 0 ? network.layout(i) : code === TURN ? "" : page.inputLayout;
  if (layout) put(runs ? "makes" : "its output", layout);
  return [
    element("p", { class: "quiet" }, `Operation ${countText(p + 1)} of ${countText(step.m)}`),
    element("h3", {}, operationWords(step, network, p)),
    tags,
    pairs,
    livingList(step, network, page, p),
  ];
}

/** What was measured of an operation, and how far that is from what is projected. */
function measuredText(step, p) {
  const more = step.measured[p] - step.total[p];
  const off = more ? `${bytesText(Math.abs(more))} ${more > 0 ? "more" : "less"}` : "as projected";
  return `${bytesText(step.measured[p])}, ${off}`;
}

function livingList(step, network, page, p) {
  const rows = liveAt(step, p);
  const list = element("ul");
  const swatch = (role) => element("span", { class: "swatch", style: `background: var(--role-${role})` });
  for (const row of rows.slice(0, LISTED)) {
    const name = liveWords(row, network, page.roles);
    const label = element("span", { class: "name", title: name }, name);
    list.append(element("li", {}, swatch(row.role), label, element("span", {}, bytesText(row.size))));
  }
  const rest = rows.slice(LISTED);
  if (rest.length) {
    const size = rest.reduce((sum, row) => sum + row.size, 0);
    const label = element("span", { class: "name" }, `and ${countText(rest.length)} more`);
    list.append(element("li", {}, element("span"), label, element("span", {}, bytesText(size))));
  }
  return element("div", { class: "living" }, element("h4", {}, "Live meanwhile, largest first"), list);
}

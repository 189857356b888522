// ---- network: the stages by block, of which those in sight alone are elements -------------------

const ROW = 30; // pixels, as in the style

const COLUMNS = [
  { name: "#", value: ({ i }) => i, text: ({ i }) => String(i) },
  { name: "stage", value: ({ name }) => name, text: ({ name }) => name },
  { name: "forward", value: ({ forward }) => forward, text: ({ forward }) => secondsText(forward) },
  { name: "backward", value: ({ backward }) => backward, text: ({ backward }) => secondsText(backward) },
  { name: "state", value: ({ state }) => state, text: ({ state }) => bytesText(state) },
  { name: "tape", value: ({ tape }) => tape, text: ({ tape }) => bytesText(tape) },
  { name: "param. gradients", value: (x) => x.parameters, text: (x) => bytesText(x.parameters) },
  { name: "runs", value: ({ runs }) => runs, text: ({ runs }) => String(runs) },
  { name: "in this plan", value: ({ fate }) => fate, text: ({ fate }) => fate },
];
const SUMMED = ["forward", "backward", "state", "tape", "parameters", "runs"];

/** The table; `onPick` is told of a stage that was clicked, or chosen by keys. */
function makeNetworkTable(host, count, network, onPick) {
  const head = element("div", { class: "row head", role: "row" });
  const body = element("div", { class: "body", role: "rowgroup", tabindex: "0", "aria-label": "Stages; arrow keys choose" });
  const space = element("div");
  const order = { column: 0, down: false };
  let [stages, rows, chosen, text, byBlock] = [[], [], 0, "", network.blocks.length > 1];
  body.append(space);
  host.replaceChildren(element("div", { role: "rowgroup" }, head), body);
  COLUMNS.forEach((column, k) => {
    const button = element("button", { type: "button" }, column.name);
    button.addEventListener("click", () => {
      order.down = order.column === k ? !order.down : k > 1;
      order.column = k;
      arrange();
    });
    head.append(element("span", { role: "columnheader" }, button));
  });

  function factsOf(step) {
    return Array.from({ length: network.count }, (_, k) => {
      const i = k + 1;
      const tape = network.tapes(i)[step.option[i]];
      return {
        i, name: network.name(i), forward: network.forwardSeconds(i), backward: tape[1],
        state: network.stateBytes(i), tape: tape[2], parameters: network.parameterBytes(i),
        runs: step.runs[i], fate: fateWords(step, i), block: network.blockOf[i],
      };
    });
  }

  function compare(a, b) {
    const of = COLUMNS[order.column].value;
    const [left, right] = [of(a), of(b)];
    const sign = typeof left === "string" ? left.localeCompare(right, "en", { numeric: true }) : left - right;
    return (order.down ? -sign : sign) || a.i - b.i;
  }

  /** Choose the rows that are shown, and their order. */
  function arrange() {
    const wanted = text.toLowerCase();
    const found = stages.filter((stage) => stage.name.toLowerCase().includes(wanted));
    if (byBlock && network.blocks.length > 1) {
      const groups = new Map();
      for (const stage of found) {
        if (!groups.has(stage.block)) groups.set(stage.block, []);
        groups.get(stage.block).push(stage);
      }
      const sums = [...groups].map(([block, parts]) => blockRow(network.blocks[block], parts));
      rows = sums.sort(compare).flatMap((sum) => [sum, ...sum.parts.sort(compare)]);
    } else {
      rows = found.sort(compare);
    }
    [...head.children].forEach((cell, k) => {
      if (k === order.column) cell.setAttribute("aria-sort", order.down ? "descending" : "ascending");
      else cell.removeAttribute("aria-sort");
    });
    host.setAttribute("aria-rowcount", rows.length + 1);
    host.style.setProperty("--inset", byBlock && network.blocks.length > 1 ? "0.9rem" : "0");
    count.textContent = wanted
      ? `${countText(found.length)} of ${countText(network.count)} stages match`
      : `${countText(network.count)} stages${network.blocks.length > 1 ? ` in ${countText(network.blocks.length)} blocks` : ""}`;
    space.style.height = `${rows.length * ROW}px`;
    render();
  }

  function blockRow(block, parts) {
    const row = { parts, isBlock: true, i: block.first, name: block.name || "model" };
    for (const key of SUMMED) row[key] = parts.reduce((sum, stage) => sum + stage[key], 0);
    const again = parts.filter((stage) => stage.runs > 1).length;
    row.fate = `${countText(parts.length)} stage${parts.length > 1 ? "s" : ""}${again ? `, ${countText(again)} again` : ""}`;
    return row;
  }

  /** Put the rows in sight into the document. */
  function render() {
    const first = Math.max(0, Math.floor(body.scrollTop / ROW) - 5);
    const last = Math.min(rows.length, Math.ceil((body.scrollTop + (body.clientHeight || 460)) / ROW) + 5);
    const shown = [];
    for (let k = first; k < last; k++) {
      const row = rows[k];
      const classes = `row${row.isBlock ? " block" : ""}${!row.isBlock && row.i === chosen ? " chosen" : ""}`;
      const line = element("div", { class: classes, role: "row", "aria-rowindex": k + 2, style: `top: ${k * ROW}px` });
      COLUMNS.forEach((column, c) => {
        const cell = element("span", { role: c === 1 ? "rowheader" : "cell" }, row.isBlock && c === 0 ? "" : column.text(row));
        if (c === 1) cell.title = row.name;
        if (c === 7 && !row.isBlock && row.runs > 1) cell.className = "ran-again";
        line.append(cell);
      });
      if (!row.isBlock) {
        line.dataset.stage = row.i;
        line.setAttribute("aria-selected", row.i === chosen);
        line.addEventListener("click", () => onPick(row.i));
      }
      shown.push(line);
    }
    space.replaceChildren(...shown);
  }

  body.addEventListener("scroll", render);
  body.addEventListener("keydown", (event) => {
    const way = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!way || !rows.length) return;
    event.preventDefault();
    let k = rows.findIndex((row) => !row.isBlock && row.i === chosen) + way;
    while (rows[k]?.isBlock) k += way;
    if (rows[k]) onPick(rows[k].i);
  });
  new ResizeObserver(render).observe(body);

  return {
    setPlan(step) {
      stages = factsOf(step);
      arrange();
    },
    search(words) {
      text = words;
      body.scrollTop = 0;
      arrange();
      return count.textContent;
    },
    group(on) {
      byBlock = on;
      arrange();
    },
    choose(stage) {
      chosen = stage;
      const k = rows.findIndex((row) => !row.isBlock && row.i === stage);
      const [top, tall] = [k * ROW, body.clientHeight];
      if (k >= 0 && (top < body.scrollTop || top + ROW > body.scrollTop + tall)) {
        body.scrollTop = Math.max(0, top - tall / 2);
      }
      render();
    },
  };
}

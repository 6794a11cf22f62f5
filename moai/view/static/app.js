// The pages of `moai view`. All state is in the address; text of the corpus becomes text nodes and nothing else.

const main = document.getElementById("main");
const rail = document.getElementById("rail");
const keys = document.getElementById("keys");
// Controls, marks that turn the writing direction, and what cannot be seen are shown by their numbers.
const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g;
let handlers = {};
let asked = 0;

function element(name, attributes = {}, ...inside) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "onclick") made.addEventListener("click", value);
    else if (value !== null && value !== undefined) made.setAttribute(key, value);
  }
  for (const part of inside.flat(Infinity)) made.append(part instanceof Node ? part : document.createTextNode(String(part)));
  return made;
}

function visible(text) {
  const parts = [];
  let at = 0;
  for (const found of text.matchAll(HIDDEN)) {
    if (found.index > at) parts.push(text.slice(at, found.index));
    const code = found[0].codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
    parts.push(element("span", { class: "chip" }, `U+${code}`));
    at = found.index + found[0].length;
  }
  parts.push(text.slice(at));
  return parts;
}

const count = (number) => (number === null || number === undefined ? "" : Number(number).toLocaleString("en"));
const route = () => decodeURIComponent(location.pathname).split("/").filter(Boolean);
const parameters = () => Object.fromEntries(new URLSearchParams(location.search));

function address(path, query = {}) {
  const given = Object.entries(query).filter(([, value]) => value !== undefined && value !== "" && value !== null);
  return path + (given.length ? "?" + new URLSearchParams(given) : "");
}

function go(path, query) {
  history.pushState(null, "", address(path, query));
  show();
}

const link = (path, query, ...inside) =>
  element("a", { href: address(path, query), onclick: (event) => { event.preventDefault(); go(path, query); } }, ...inside);

async function ask(path, query) {
  const answer = await fetch(address(path, query));
  if (!answer.ok) throw new Error(await answer.text());
  return answer.json();
}

function table(heads, rows, chosen = -1) {
  const number = (cell) => typeof cell === "number";
  return element("table", {},
    element("tr", {}, heads.map((head) => element("th", {}, head))),
    rows.map((row, at) => element("tr", { class: at === chosen ? "chosen" : null }, row.map((cell) =>
      element("td", { class: number(cell) ? "number" : null }, number(cell) ? count(cell) : cell)))));
}

async function home() {
  const directories = await ask("/api/home");
  return [element("h2", {}, "Prepared directories"), directories.map((one) => {
    const most = Math.max(...one.sources.map((source) => source.tokens), 1);
    const dropped = Object.entries(one.filtered).map(([reason, number]) => `${reason} ${count(number)}`).join(", ");
    return [element("h3", {}, link(`/d/${one.key}/documents`, {}, visible(one.name))),
      element("p", { class: "soft" }, `${count(one.documents)} of ${count(one.read)} documents kept, ` +
        `${count(one.tokens)} tokens, ${count(one.rows)} rows of ${one.seq_len} (${one.packing}, ` +
        `${(100 * one.fill).toFixed(1)} % filled); dropped: ${dropped || "none"}; ${count(one.quarantined)} set aside `,
        element("span", { class: "badge" }, "exact")),
      table(["source", "documents", "tokens", ""], one.sources.map((source) => {
        const bar = element("span", { class: "bar" });
        bar.style.width = `${(100 * source.tokens) / most}%`;
        return [element("span", {}, visible(source.name)), source.documents, source.tokens, bar];
      }))];
  })];
}

async function documents(key) {
  const query = parameters();
  const found = await ask(`/api/d/${key}/documents`, query);
  const at = Math.min(Number(query.at || 0), Math.max(0, found.documents.length - 1));
  const filter = { reason: query.reason, source: query.source };
  const open = (number) => go(`/d/${key}/document/${number}`, filter);
  const move = (step) => { const to = Math.max(0, Math.min(found.documents.length - 1, at + step));
    history.replaceState(null, "", address(`/d/${key}/documents`, { ...query, at: to })); show(); };
  handlers = { j: () => move(1), k: () => move(-1), J: () => move(50), K: () => move(-50),
    Enter: () => found.documents[at] && open(found.documents[at].number),
    n: () => found.next !== null && go(`/d/${key}/documents`, { ...filter, from: found.next }),
    r: () => go(`/d/${key}/document/${Math.floor(Math.random() * found.total)}`, filter) };
  keys.textContent = "j k choose · J K by 50 · Enter open · n next page · r any document · h home";
  const choose = (reason) => link(`/d/${key}/documents`, { source: query.source, reason }, reason || "all");
  return [element("h2", {}, `Documents of ${count(found.total)} that were read`),
    element("p", {}, "show: ", ["", "kept", ...found.reasons].map((reason) =>
      [reason === (query.reason || "") ? element("b", {}, reason || "all") : choose(reason), "  "])),
    table(["", "source", "tokens", "bytes", "", "begins"], found.documents.map((one) => [
      link(`/d/${key}/document/${one.number}`, filter, count(one.number)), element("span", {}, visible(one.source)),
      one.tokens, one.bytes, one.reason ? element("span", { class: "badge" }, one.reason) : "",
      element("span", {}, visible(one.opening))]), at),
    found.next === null ? "" : link(`/d/${key}/documents`, { ...filter, from: found.next }, "next page")];
}

const painted = (pieces) => pieces.map((piece) => element("span", {
  class: [piece.special ? "special" : "", piece.learned ? "learned" : ""].join(" ").trim() || null,
  title: piece.ids.join(" ") + (piece.learned === false ? ", context" : "") }, visible(piece.text)));

async function one(key, number) {
  const query = parameters();
  const filter = { reason: query.reason, source: query.source };
  const [found, near] = await Promise.all([ask(`/api/d/${key}/document`, { n: number }),
    ask(`/api/d/${key}/near`, { n: number, ...filter })]);
  const step = (to) => to !== null && go(`/d/${key}/document/${to}`, query);
  const views = ["text", "tokens"];
  const view = found.pieces_of ? query.view || "text" : "text";
  handlers = { j: () => step(near.next), k: () => step(near.previous), u: () => go(`/d/${key}/documents`, filter),
    t: () => go(`/d/${key}/document/${number}`, { ...query, view: views[(views.indexOf(view) + 1) % 2] }),
    w: () => found.first_row !== null && go(`/d/${key}/row/${found.first_row}`, {}),
    d: () => found.keeper !== undefined && go(`/d/${key}/document/${found.keeper}`, {}),
    r: () => go(`/d/${key}/document/${Math.floor(Math.random() * found.total)}`, query) };
  keys.textContent = "j k next, previous · t text or tokens · w its row · d what stayed in its place · r any · u list · h home";
  const facts = [["source", element("span", {}, visible(found.source))],
    ["file", found.file ? element("span", {}, visible(found.file.name), ` at ${count(found.file.offset)}`) : ""],
    ["bytes", found.bytes], ["tokens", found.tokens], ["kept", found.reason === null ? "yes" : `no: ${found.reason}`],
    ["row", found.first_row === null ? "" : link(`/d/${key}/row/${found.first_row}`, {}, count(found.first_row))],
    ["pieces", found.pieces]];
  if (found.failed.length) facts.push(["fails", found.failed.join(", ")]);
  if (found.keeper !== undefined)
    facts.push(["copy of", link(`/d/${key}/document/${found.keeper}`, {}, count(found.keeper))],
      ["Jaccard", found.jaccard === null ? "same text" : found.jaccard.toFixed(3)]);
  const said = { tokens: "decoded from its tokens", record: "its record in the source file, as that is now",
    nothing: "its text is not in this directory" }[found.from];
  return [element("h2", {}, `Document ${count(number)} of ${count(found.total)} `,
    element("span", { class: "badge" }, said)),
    element("div", { class: "columns" },
      view === "tokens" ? element("div", { class: "text tokens" }, painted(found.pieces_of))
        : element("div", { class: "text" }, visible(found.text || "")),
      element("div", {}, table(["", ""], facts),
        Object.keys(found.signals).length ? element("h3", {}, "Measured") : "",
        table(["", ""], Object.entries(found.signals).map(([name, value]) => [name, value]))))];
}

async function row(key, number) {
  const found = await ask(`/api/d/${key}/row`, { n: number });
  const step = (by) => { const to = Number(number) + by; if (to >= 0 && to < found.total) go(`/d/${key}/row/${to}`, {}); };
  handlers = { j: () => step(1), k: () => step(-1), J: () => step(100), K: () => step(-100),
    r: () => go(`/d/${key}/row/${Math.floor(Math.random() * found.total)}`, {}) };
  keys.textContent = "j k next, previous row · J K by 100 · r any · h home";
  return [element("h2", {}, `Row ${count(number)} of ${count(found.total)}, of `, visible(found.source)),
    element("p", { class: "soft" }, element("span", { class: "learned" }, "learned"), " · context · ",
      element("span", { class: "special" }, "special token"), " · a dashed edge: the document began in a row before"),
    found.documents.map((document) => [
      element("p", { class: "soft" }, document.number === null ? "" :
        link(`/d/${key}/document/${document.number}`, {}, `document ${count(document.number)}`),
        ` ${count(document.pieces.reduce((sum, piece) => sum + piece.ids.length, 0))} tokens `,
        visible(Object.entries(document.beside).map(([name, value]) => `${name} = ${value}`).join(", "))),
      element("div", { class: `text tokens${document.torn ? " torn" : ""}` }, painted(document.pieces))])];
}

async function quarantine(key) {
  const found = await ask(`/api/d/${key}/quarantine`, parameters());
  keys.textContent = "h home";
  const counts = Object.entries(found.counted).map(([name, number]) => `${name} ${count(number)}`).join(", ");
  return [element("h2", {}, "Records set aside"), element("p", { class: "soft" }, counts),
    table(["file", "line", "byte", "reason", "detail"], found.records.map((record) => [
      element("span", {}, visible(String(record.file))), record.line, record.offset,
      element("span", {}, visible(String(record.reason))), element("span", {}, visible(String(record.detail)))]))];
}

function frame(key, what) {
  const entry = (path, name, current) =>
    element("a", { href: path, "aria-current": current ? "page" : null,
      onclick: (event) => { event.preventDefault(); go(path, {}); } }, name);
  rail.replaceChildren(element("h1", {}, "moai view"), entry("/", "Home", !key));
  if (key) rail.append(element("h2", {}, `directory ${key}`),
    entry(`/d/${key}/documents`, "Documents", what === "documents" || what === "document"),
    entry(`/d/${key}/row/0`, "Rows", what === "row"),
    entry(`/d/${key}/quarantine`, "Set aside", what === "quarantine"));
}

async function show() {
  const [, key, what = "documents", number] = route();
  const mine = ++asked;
  handlers = {};
  keys.textContent = "h home";
  frame(key, what);
  let made;
  try {
    if (!key) made = await home();
    else if (what === "documents") made = await documents(key);
    else if (what === "document") made = await one(key, number);
    else if (what === "row") made = await row(key, number);
    else if (what === "quarantine") made = await quarantine(key);
    else throw new Error("there is no such page");
  } catch (error) {
    made = [element("p", { class: "error" }, visible(String(error.message)))];
  }
  if (mine !== asked) return; // another page was asked for meanwhile
  main.replaceChildren(...made.flat(Infinity).map((part) => (part instanceof Node ? part : document.createTextNode(part))));
  document.title = `${main.querySelector("h2")?.textContent || "moai"} - moai view`;
  main.dataset.ready = location.pathname + location.search;
}

addEventListener("popstate", show);
addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, textarea")) return;
  if (event.key === "h") go("/", {});
  else if (handlers[event.key]) { event.preventDefault(); handlers[event.key](); }
});
show();

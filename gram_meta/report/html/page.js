(function () {
  "use strict";
  function all(selector, inside) { return Array.from((inside || document).querySelectorAll(selector)); }
  function make(tag, attributes, text) {
    var element = document.createElement(tag);
    Object.keys(attributes).forEach(function (name) { element.setAttribute(name, attributes[name]); });
    if (text) element.textContent = text;
    return element;
  }
  function words(input) { return input.value.toLowerCase().split(/\s+/).filter(Boolean); }
  function fits(text, wanted) { return wanted.every(function (word) { return text.indexOf(word) >= 0; }); }

  /* The number at the beginning of a cell; text where there is none. */
  function value(row, column) {
    var text = row.cells[column].textContent.trim().replace(/,/g, "");
    var number = parseFloat(text);
    return isNaN(number) ? text.toLowerCase() : number;
  }
  function compare(a, b) {
    if (typeof a === typeof b) return typeof a === "number" ? a - b : a.localeCompare(b);
    return typeof a === "number" ? -1 : 1;
  }

  /* Sorting: each heading of a flat table is a button; a second press turns the order around. */
  function sortable(table) {
    var body = table.tBodies[0], headings = all("thead th", table);
    headings.forEach(function (heading, column) {
      var button = make("button", { type: "button" }, heading.textContent);
      heading.textContent = "";
      heading.appendChild(button);
      button.addEventListener("click", function () {
        var down = heading.getAttribute("aria-sort") === "ascending";
        headings.forEach(function (other) { other.removeAttribute("aria-sort"); });
        heading.setAttribute("aria-sort", down ? "descending" : "ascending");
        all("tr", body)
          .map(function (row, place) { return { row: row, key: value(row, column), place: place }; })
          .sort(function (a, b) { return (down ? -1 : 1) * compare(a.key, b.key) || a.place - b.place; })
          .forEach(function (one) { body.appendChild(one.row); });
      });
    });
  }

  /* Searching: a row is shown if it, or its block's first row, has all the words. */
  function searchable(table, place) {
    var rows = all("tbody tr", table);
    if (rows.length < 6) return;
    var name = table.getAttribute("aria-label") || "this table", id = "find-" + place, block = "", texts;
    texts = rows.map(function (row) {
      var first = row.cells[0].tagName === "TD" ? row.cells[0].textContent.trim() : "";
      block = row.cells[0].tagName === "TD" ? first || block : "";
      return (block + " " + row.textContent).toLowerCase();
    });
    var form = make("form", { "class": "find", role: "search", "aria-label": "Search " + name });
    var input = make("input", { type: "search", id: id, autocomplete: "off" });
    var found = make("output", { "aria-live": "polite", "for": id });
    [make("label", { "for": id }, "Search"), input, found].forEach(function (part) { form.appendChild(part); });
    input.addEventListener("input", function () {
      var wanted = words(input), shown = 0;
      rows.forEach(function (row, index) {
        row.hidden = !fits(texts[index], wanted);
        shown += row.hidden ? 0 : 1;
      });
      found.textContent = wanted.length ? shown + " of " + rows.length + " rows" : "";
    });
    form.addEventListener("submit", function (event) { event.preventDefault(); });
    table.parentNode.parentNode.insertBefore(form, table.parentNode);
  }

  /* One run: the list chooses which one is open; a link to a run opens it. */
  function chooser() {
    var form = document.querySelector("form.choose"), runs = all("details.run");
    if (!form || !runs.length) return;
    var list = form.querySelector("select"), search = form.querySelector("input"), found = form.querySelector("output");
    var options = Array.from(list.options);
    function show(id) {
      runs.forEach(function (run) { run.hidden = run.id !== id; run.open = run.id === id; });
      list.value = id;
    }
    function linked() {
      var id = decodeURIComponent(location.hash.slice(1));
      if (runs.some(function (run) { return run.id === id; })) {
        show(id);
        document.getElementById(id).scrollIntoView();
      }
    }
    search.addEventListener("input", function () {
      var wanted = words(search);
      var left = options.filter(function (option) { return fits(option.textContent.toLowerCase(), wanted); });
      list.replaceChildren.apply(list, left);
      found.textContent = wanted.length ? left.length + " of " + options.length + " runs" : "";
      if (left.length) show(left.some(function (it) { return it.selected; }) ? list.value : left[0].value);
    });
    list.addEventListener("change", function () { show(list.value); });
    form.addEventListener("submit", function (event) { event.preventDefault(); });
    window.addEventListener("hashchange", linked);
    form.hidden = false;
    show(runs[0].id);
    linked();
  }

  all("table").forEach(function (table, place) {
    if (table.classList.contains("sort")) sortable(table);
    if (!table.classList.contains("matrix")) searchable(table, place);
  });
  chooser();
})();

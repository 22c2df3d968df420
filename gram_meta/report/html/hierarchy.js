(function () {
  var form = document.querySelector("form.find");
  if (!form) return;
  form.hidden = false;
  var search = form.querySelector("input[type=search]"), repeated = form.querySelector("input[type=checkbox]");
  var found = form.querySelector("output"), items = document.querySelectorAll("[data-find]");
  function show() {
    var words = search.value.toLowerCase().split(/\s+/).filter(Boolean), all = 0, shown = 0;
    items.forEach(function (item) {
      var text = item.getAttribute("data-find");
      var fits = words.every(function (word) { return text.indexOf(word) >= 0; })
        && (!repeated.checked || item.hasAttribute("data-repeated"));
      item.hidden = !fits;
      if (item.classList.contains("topic")) { all += 1; shown += fits ? 1 : 0; }
    });
    found.textContent = shown < all ? shown + " of " + all + " topics" : "";
  }
  form.addEventListener("input", show);
  form.addEventListener("submit", function (event) { event.preventDefault(); });
  show();
})();

// Order of search results: a section whose heading matches, then pages for users, then the page for developers.
// The numbers without a comment are Sphinx's defaults.
var Scorer = {
  score: ([page, title, anchor, description, score]) =>
    score + (anchor ? 50 : 0) - (page === "architecture" ? 50 : 0),
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: { 0: 15, 1: 5, 2: -5 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
};

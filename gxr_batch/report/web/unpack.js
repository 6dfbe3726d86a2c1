// The cases out of the two blocks that packing.py made.

const ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%:()*+-;,=.?@^_[{|}~";

function bytesOf(text, size) {
  const digit = new Uint8Array(128);
  for (let at = 0; at < 85; at++) digit[ALPHABET.charCodeAt(at)] = at;
  const bytes = new Uint8Array((text.length / 5) * 4);
  for (let from = 0, to = 0; from < text.length; from += 5) {
    let value = 0;
    for (let place = 0; place < 5; place++) value = value * 85 + digit[text.charCodeAt(from + place)];
    for (let shift = 3; shift >= 0; shift--, value = Math.floor(value / 256)) bytes[to + shift] = value % 256;
    to += 4;
  }
  return bytes.subarray(0, size);
}

async function unpacked(id) {
  const block = byId(id);
  const bytes = bytesOf(block.textContent, Number(block.dataset.bytes));
  block.remove(); // its five million letters are of no use any more
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

function fillWords(head, bytes) {
  const columns = head.columns.filter((column) => column.kind === "words");
  for (const column of columns) column.values = new Array(head.rows).fill(null);
  let at = 0;
  const number = () => {
    let value = 0;
    for (let shift = 0; ; shift += 7) {
      const byte = bytes[at++];
      value |= (byte & 127) << shift;
      if (byte < 128) return value;
    }
  };
  for (let row = 0; row < head.rows; row++) {
    for (const column of columns) {
      const pieces = []; // joined at once: a text that grows word by word takes several times its memory
      let empty = false;
      for (let word = number(); word !== 0; word = number()) {
        if (word === 1) empty = true;
        else pieces.push(head.words[word - 2]);
      }
      column.values[row] = empty ? null : pieces.join("");
    }
  }
}

async function load() {
  const head = JSON.parse(new TextDecoder().decode(await unpacked("block-head")));
  fillWords(head, await unpacked("block-texts"));
  return head;
}

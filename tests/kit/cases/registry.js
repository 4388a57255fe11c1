// Where the files of cases put them. pytest finds their names in the lines that begin with test(".
export const cases = new Map();
export const test = (name, run) => cases.set(name, run);

//! Sudoku of 4 by 4, with one solution that is found cell by cell.

use crate::{Care, Draw, Family, Work};

/// See the module. A key is the 16 cells row by row, `.` for a blank.
pub struct Sudoku;

/// Cells filled at once with little care.
const AT_ONCE: usize = 3;
const CELLS: usize = 16;

/// The cells row by row, 0 for a blank.
type Grid = [u8; CELLS];

fn read(key: &str) -> Grid {
    let mut grid = [0; CELLS];
    for (cell, byte) in grid.iter_mut().zip(key.bytes()) {
        *cell = if byte == b'.' { 0 } else { byte - b'0' };
    }
    grid
}

fn rows(grid: &Grid) -> String {
    let digit = |&cell: &u8| if cell == 0 { '.' } else { char::from(b'0' + cell) };
    grid.chunks(4).map(|row| row.iter().map(digit).collect::<String>()).collect::<Vec<_>>().join(" ")
}

/// Whether two cells share a row, column or box.
fn meet(one: usize, two: usize) -> bool {
    let place = |cell: usize| (cell / 4, cell % 4);
    let ((r1, c1), (r2, c2)) = (place(one), place(two));
    r1 == r2 || c1 == c2 || (r1 / 2, c1 / 2) == (r2 / 2, c2 / 2)
}

/// Which digits stand in cells that meet this one, in rising order.
fn seen(grid: &Grid, cell: usize) -> Vec<u8> {
    (1..=4)
        .filter(|&digit| (0..CELLS).any(|other| other != cell && meet(cell, other) && grid[other] == digit))
        .collect()
}

/// A step: the cell, the three digits that it sees, the fourth.
type Fill = (usize, Vec<u8>, u8);

/// Fills again and again the first cell that sees three digits; the steps, and the grid as far as it went.
fn fill(mut grid: Grid) -> (Vec<Fill>, Grid) {
    let mut fills = Vec::new();
    let only = |grid: &Grid| {
        (0..CELLS)
            .filter(|&cell| grid[cell] == 0)
            .map(|cell| (cell, seen(grid, cell)))
            .find(|(_, seen)| seen.len() == 3)
    };
    while let Some((cell, seen)) = only(&grid) {
        // the digits sum to 10
        let digit = 10 - seen.iter().sum::<u8>();
        grid[cell] = digit;
        fills.push((cell, seen, digit));
    }
    (fills, grid)
}

/// A full grid that keeps the rules: all are reached.
fn draw_full(draw: &mut Draw) -> Grid {
    fn place(grid: &mut Grid, cell: usize, draw: &mut Draw) -> bool {
        if cell == CELLS {
            return true;
        }
        let mut digits = [1, 2, 3, 4];
        draw.shuffle(&mut digits);
        for digit in digits {
            if !seen(grid, cell).contains(&digit) {
                grid[cell] = digit;
                if place(grid, cell + 1, draw) {
                    return true;
                }
                grid[cell] = 0;
            }
        }
        false
    }
    let mut grid = [0; CELLS];
    place(&mut grid, 0, draw);
    grid
}

impl Family for Sudoku {
    fn name(&self) -> &'static str {
        "sudoku"
    }

    fn about(&self) -> &'static str {
        "fill a 4 by 4 sudoku; the level is the number of blanks"
    }

    fn levels(&self) -> u32 {
        10
    }

    fn key(&self, level: u32, draw: &mut Draw) -> String {
        loop {
            let mut grid = draw_full(draw);
            let mut cells: Vec<usize> = (0..CELLS).collect();
            draw.shuffle(&mut cells);
            let mut blanks = 0;
            for cell in cells {
                let digit = std::mem::take(&mut grid[cell]);
                if fill(grid).1.contains(&0) {
                    grid[cell] = digit;
                } else {
                    blanks += 1;
                }
                if blanks == level {
                    return rows(&grid).replace(' ', "");
                }
            }
        }
    }

    fn prompt(&self, key: &str, draw: &mut Draw) -> String {
        let rows = rows(&read(key));
        match draw.below(2) {
            0 => format!("Solve this 4x4 sudoku: {rows}"),
            _ => format!("Fill the blanks of the 4x4 sudoku {rows} and give its four rows."),
        }
    }

    fn answer(&self, key: &str) -> String {
        rows(&fill(read(key)).1)
    }

    fn verify(&self, key: &str, answer: &str) -> bool {
        let mut grid = [0; CELLS];
        let mut count = 0;
        for c in answer.chars() {
            match c {
                '1'..='4' if count < CELLS => {
                    grid[count] = c as u8 - b'0';
                    count += 1;
                }
                ',' | ';' | '/' | '|' => {}
                c if c.is_whitespace() => {}
                _ => return false,
            }
        }
        let givens = read(key);
        count == CELLS
            && (0..CELLS).all(|cell| givens[cell] == 0 || givens[cell] == grid[cell])
            && (0..CELLS).all(|cell| !seen(&grid, cell).contains(&grid[cell]))
    }

    /// Each line is a cell, with care the digits it sees, and its digit: `r1c2 134 2`; with little care three cells.
    fn work(&self, key: &str, care: Care, _draw: &mut Draw) -> Option<Work> {
        let fills = fill(read(key)).0;
        let step = |(cell, seen, digit): &Fill| {
            let cell = format!("r{}c{}", cell / 4 + 1, cell % 4 + 1);
            let seen: String = seen.iter().map(u8::to_string).collect();
            if care == Care::Full { format!("{cell} {seen} {digit}") } else { format!("{cell} {digit}") }
        };
        let at_once = if care == Care::Full { 1 } else { AT_ONCE };
        let line = |fills: &[Fill]| fills.iter().map(step).collect::<Vec<_>>().join(" ");
        let lines: Vec<String> = fills.chunks(at_once).map(line).collect();
        let thought = if care == Care::None { String::new() } else { lines.join("\n") };
        Some(Work { thought, answer: self.answer(key) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "1.34341.21434321";

    #[test]
    fn rules_and_givens_count() {
        assert_eq!(Sudoku.answer(KEY), "1234 3412 2143 4321");
        for answer in ["1234\n3412\n2143\n4321", "1234341221434321", "1 2 3 4 | 3 4 1 2 | 2 1 4 3 | 4 3 2 1"]
        {
            assert!(Sudoku.verify(KEY, answer), "{answer}");
        }
        for answer in [
            // the rules are kept, the givens are not
            "2143 4321 1234 3412",
            "1134 3412 2143 4321",
            "1234 3412 2143 432",
            "1234 3412 2143 43211",
            "1234 3412 2143 4325",
            "1.34 341. 2143 4321",
        ] {
            assert!(!Sudoku.verify(KEY, answer), "{answer}");
        }
        assert!(!Sudoku.verify(KEY, &"1234".repeat(50_000)));
    }

    #[test]
    fn there_is_one_solution() {
        fn solutions(grid: &mut Grid) -> usize {
            let Some(cell) = grid.iter().position(|&cell| cell == 0) else { return 1 };
            let seen = seen(grid, cell);
            let mut count = 0;
            for digit in (1..=4).filter(|digit| !seen.contains(digit)) {
                grid[cell] = digit;
                count += solutions(grid);
                grid[cell] = 0;
            }
            count
        }
        assert_eq!(solutions(&mut [0; CELLS]), 288);
        for level in 1..=10 {
            for index in 0..20 {
                let key = Sudoku.key(level, &mut Draw::new(3, index));
                assert_eq!(key.bytes().filter(|&byte| byte == b'.').count(), level as usize);
                assert_eq!(solutions(&mut read(&key)), 1, "{key}");
            }
        }
    }

    #[test]
    fn thoughts_are_as_written_here() {
        let thought = |care| Sudoku.work(KEY, care, &mut Draw::new(0, 0)).unwrap().thought;
        assert_eq!(thought(Care::Full), "r1c2 134 2\nr2c4 134 2");
        assert_eq!(thought(Care::Brief), "r1c2 2 r2c4 2");
    }
}

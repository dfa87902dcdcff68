//! Shortest ways through small mazes.

use crate::{Care, Draw, Family, Work};

/// See the module. A key is the rows with `/` between: `S.#/..#/#.G`.
pub struct Maze;

/// Rows, columns and shortest way at each level, at least.
const SIZES: [(usize, usize, usize); 6] = [(3, 3, 2), (3, 4, 3), (4, 4, 4), (4, 5, 6), (5, 5, 7), (6, 6, 9)];
/// A cell is a wall with this probability.
const WALLS: f64 = 0.3;
/// Moves at once with little care.
const AT_ONCE: usize = 3;
/// The moves in the order in which they are tried: name, rows down, columns right.
const MOVES: [(char, isize, isize); 4] = [('U', -1, 0), ('D', 1, 0), ('L', 0, -1), ('R', 0, 1)];

/// A row and a column.
type Cell = (usize, usize);

/// A key, read.
struct Grid<'k> {
    rows: Vec<&'k [u8]>,
}

impl<'k> Grid<'k> {
    fn read(key: &'k str) -> Self {
        Self { rows: key.split('/').map(str::as_bytes).collect() }
    }

    fn find(&self, what: u8) -> Cell {
        let at = |(r, row): (usize, &&[u8])| row.iter().position(|&cell| cell == what).map(|c| (r, c));
        self.rows.iter().enumerate().find_map(at).expect("a key of this family")
    }

    /// The cell after a move, if it is no wall.
    fn step(&self, (r, c): Cell, (_, down, right): (char, isize, isize)) -> Option<Cell> {
        let to = (r.checked_add_signed(down)?, c.checked_add_signed(right)?);
        self.rows.get(to.0)?.get(to.1).is_some_and(|&cell| cell != b'#').then_some(to)
    }

    /// The cells at each distance from one, nearest first; each distance row by row.
    fn waves(&self, from: Cell) -> Vec<Vec<Cell>> {
        let mut waves = vec![vec![from]];
        let mut met = vec![from];
        while let Some(last) = waves.last().filter(|wave| !wave.is_empty()) {
            let mut next: Vec<Cell> = last
                .iter()
                .flat_map(|&cell| MOVES.iter().filter_map(move |&way| self.step(cell, way)))
                .collect();
            next.retain(|cell| !met.contains(cell));
            next.sort_unstable();
            next.dedup();
            met.extend(&next);
            waves.push(next);
        }
        waves.pop();
        waves
    }

    /// The first of the shortest ways, by the order of moves: each move and the cell that it starts from.
    fn way(&self) -> Vec<(Cell, char)> {
        let waves = self.waves(self.find(b'G'));
        let mut cell = self.find(b'S');
        let from = waves.iter().position(|wave| wave.contains(&cell)).expect("a key of this family");
        let mut way = Vec::with_capacity(from);
        for nearer in waves[..from].iter().rev() {
            let good = |&(name, down, right): &(char, isize, isize)| {
                self.step(cell, (name, down, right)).filter(|to| nearer.contains(to)).map(|to| (name, to))
            };
            let (name, to) = MOVES.iter().find_map(good).expect("a wave is reached from the next");
            way.push((cell, name));
            cell = to;
        }
        way
    }
}

/// Row and column from 1, as in `23`.
fn show((r, c): Cell) -> String {
    format!("{}{}", r + 1, c + 1)
}

/// Reads `RRD`, `r, r, d` or `right right down`, of up to `most` moves.
fn parse(answer: &str, most: usize) -> Option<Vec<char>> {
    let mut moves = Vec::new();
    let cut = |c: char| c.is_whitespace() || matches!(c, ',' | '.' | '-');
    for word in answer.split(cut).filter(|word| !word.is_empty()) {
        match word.to_ascii_lowercase().as_str() {
            "up" => moves.push('U'),
            "down" => moves.push('D'),
            "left" => moves.push('L'),
            "right" => moves.push('R'),
            _ => moves.extend(word.chars().map(|c| c.to_ascii_uppercase())),
        }
        if moves.len() > most {
            return None;
        }
    }
    Some(moves)
}

impl Family for Maze {
    fn name(&self) -> &'static str {
        "maze"
    }

    fn about(&self) -> &'static str {
        "find a shortest way through a small maze"
    }

    fn levels(&self) -> u32 {
        SIZES.len() as u32
    }

    fn key(&self, level: u32, draw: &mut Draw) -> String {
        let (height, width, least) = SIZES[level as usize - 1];
        loop {
            let mut rows: Vec<Vec<u8>> = (0..height)
                .map(|_| (0..width).map(|_| if draw.chance(WALLS) { b'#' } else { b'.' }).collect())
                .collect();
            let start = (draw.below(height as u64) as usize, draw.below(width as u64) as usize);
            rows[start.0][start.1] = b'S';
            let waves = Grid { rows: rows.iter().map(Vec::as_slice).collect() }.waves(start);
            let far: Vec<Cell> = waves.into_iter().skip(least).flatten().collect();
            if !far.is_empty() {
                let goal = *draw.pick(&far);
                rows[goal.0][goal.1] = b'G';
                let row = |row: &Vec<u8>| row.iter().map(|&cell| char::from(cell)).collect::<String>();
                return rows.iter().map(row).collect::<Vec<_>>().join("/");
            }
        }
    }

    fn prompt(&self, key: &str, draw: &mut Draw) -> String {
        // blanks keep the cells apart for any tokenizer
        let row = |row: &&[u8]| {
            row.iter().map(|&cell| String::from(char::from(cell))).collect::<Vec<_>>().join(" ")
        };
        let rows = Grid::read(key).rows.iter().map(row).collect::<Vec<_>>().join("\n");
        match draw.below(2) {
            0 => format!("Shortest way from S to G, # is a wall. Answer with moves U, D, L, R.\n{rows}"),
            _ => format!("Go from S to G around the walls # in the fewest moves U, D, L, R:\n{rows}"),
        }
    }

    fn answer(&self, key: &str) -> String {
        Grid::read(key).way().iter().map(|(_, name)| name).collect()
    }

    fn verify(&self, key: &str, answer: &str) -> bool {
        let grid = Grid::read(key);
        let least = grid.way().len();
        let Some(moves) = parse(answer, least) else { return false };
        let walk = moves.iter().try_fold(grid.find(b'S'), |cell, name| {
            let way = MOVES.into_iter().find(|(move_name, ..)| move_name == name)?;
            grid.step(cell, way)
        });
        moves.len() == least && walk == Some(grid.find(b'G'))
    }

    /// With care the cells at distance 0, 1, ... from the goal up to the start, then the way move by move; without,
    /// the way by three moves.
    fn work(&self, key: &str, care: Care, _draw: &mut Draw) -> Option<Work> {
        let grid = Grid::read(key);
        let way = grid.way();
        let mut lines = Vec::new();
        if care == Care::Full {
            for (distance, wave) in grid.waves(grid.find(b'G')).iter().take(way.len() + 1).enumerate() {
                lines.push(format!(
                    "{distance}: {}",
                    wave.iter().copied().map(show).collect::<Vec<_>>().join(" ")
                ));
            }
        }
        let at_once = if care == Care::Full { 1 } else { AT_ONCE };
        let leg = |part: &[(Cell, char)]| {
            let names: String = part.iter().map(|(_, name)| name).collect();
            format!("{} {names}", show(part[0].0))
        };
        lines.push(way.chunks(at_once).map(leg).collect::<Vec<_>>().join(" "));
        let thought = if care == Care::None { String::new() } else { lines.join("\n") };
        Some(Work { thought, answer: self.answer(key) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_shortest_way_passes_and_no_other() {
        let key = "S.#/..#/#.G";
        assert_eq!(Maze.answer(key), "DRDR");
        for answer in ["DRDR", "RDDR", "d r d r", "right, down, down, right", "D-R-D-R."] {
            assert!(Maze.verify(key, answer), "{answer}");
        }
        for answer in ["DDRR", "RRDD", "DRDRLR", "DRD", "URDDR", "RLRDDR", "DRDX", "4", "DRDR DRDR", "LDRD"] {
            assert!(!Maze.verify(key, answer), "{answer}");
        }
        assert!(!Maze.verify(key, &"RL".repeat(100_000)));
    }

    #[test]
    fn ways_are_as_long_as_the_level_says() {
        for (level, (_, _, least)) in (1..).zip(SIZES) {
            for index in 0..30 {
                let key = Maze.key(level, &mut Draw::new(6, index));
                assert!(Maze.answer(&key).len() >= least, "{key}");
                assert!(Maze.verify(&key, &Maze.answer(&key)), "{key}");
            }
        }
    }

    #[test]
    fn thoughts_are_as_written_here() {
        let thought = |care| Maze.work("S.#/..#/#.G", care, &mut Draw::new(0, 0)).unwrap().thought;
        assert_eq!(thought(Care::Full), "0: 33\n1: 32\n2: 22\n3: 12 21\n4: 11\n11 D 21 R 22 D 32 R");
        assert_eq!(thought(Care::Brief), "11 DRD 32 R");
    }
}

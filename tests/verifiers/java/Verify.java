// Reads a case per line, its five parts in base64: secret, id, timestamp, signatures, body; answers each with
// "accepted" or "refused: why".

import com.standardwebhooks.Webhook;
import java.io.BufferedReader;
import java.io.InputStreamReader;
import java.nio.charset.StandardCharsets;
import java.util.Base64;
import java.util.List;
import java.util.Map;

class Verify {
    public static void main(String[] arguments) throws Exception {
        var lines = new BufferedReader(new InputStreamReader(System.in, StandardCharsets.US_ASCII));
        for (var line = lines.readLine(); line != null; line = lines.readLine()) {
            var parts = line.split("\t", -1);
            for (int place = 0; place < parts.length; place++) {
                parts[place] = new String(Base64.getDecoder().decode(parts[place]), StandardCharsets.UTF_8);
            }
            System.out.println(verdict(parts));
        }
    }

    static String verdict(String[] parts) {
        var headers = Map.of(
            "webhook-id", List.of(parts[1]),
            "webhook-timestamp", List.of(parts[2]),
            "webhook-signature", List.of(parts[3]));
        try {
            new Webhook(parts[0]).verify(parts[4], headers);
        } catch (Exception error) {
            return ("refused: " + error).replace('\n', ' ');
        }
        return "accepted";
    }
}
